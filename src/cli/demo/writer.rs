//! A client that commits one row after the other and remembers what was acknowledged: the judge of what must be there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::{CliError, open};
use crate::pg::{ConnInfo, ConnectOptions, PgError, Session};

/// Between two commits: some hundred orders a second.
const PAUSE: Duration = Duration::from_millis(4);

/// The client. Ends with [`Writer::stop`], or when it is dropped.
pub(super) struct Writer {
    /// Numbers whose commit was acknowledged while `orders` was there.
    orders: Arc<Mutex<Vec<i64>>>,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<(), PgError>>>,
}

impl Writer {
    pub(super) async fn start(conninfo: &str) -> Result<Writer, CliError> {
        let conninfo: ConnInfo = conninfo.parse().map_err(open::server_error)?;
        let options = ConnectOptions { application_name: "shop".to_owned(), ..ConnectOptions::default() };
        let session = Session::connect(&conninfo, &options).await.map_err(open::server_error)?;
        let (orders, stop) = (Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
        let task = tokio::spawn(write(session, Arc::clone(&orders), stop.clone()));
        Ok(Writer { orders, stop, task: Some(task) })
    }

    /// How many orders were acknowledged until now.
    pub(super) fn acknowledged(&self) -> usize {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Ends after the commit that is under way; the numbers of all orders that were acknowledged.
    pub(super) async fn stop(&mut self) -> Result<Vec<i64>, CliError> {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.await.map_err(CliError::failed)?.map_err(open::server_error)?;
        }
        Ok(self.orders.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Each commit writes the same number to both tables; once `orders` is gone, to the journal alone.
async fn write(mut session: Session, orders: Arc<Mutex<Vec<i64>>>, stop: CancellationToken) -> Result<(), PgError> {
    let mut has_orders = true;
    let mut number: i64 = 0;
    while !stop.is_cancelled() {
        number += 1;
        let journal = format!("INSERT INTO journal VALUES ({number}, clock_timestamp())");
        if has_orders {
            // Several statements in one query are one transaction.
            let both = format!("INSERT INTO orders VALUES ({number}, clock_timestamp()); {journal}");
            match session.query(&both).await {
                Ok(_) => orders.lock().unwrap_or_else(PoisonError::into_inner).push(number),
                Err(error) if error.sqlstate() == Some("42P01") => {
                    has_orders = false;
                    session.query(&journal).await?;
                }
                Err(error) => return Err(error),
            }
        } else {
            session.query(&journal).await?;
        }
        tokio::time::sleep(PAUSE).await;
    }
    session.close().await;
    Ok(())
}
