//! What is being restored is leased: expiry leaves it alone, and for a day what recovery reads then.
//!
//! A lease saves work and guards nothing: where it cannot be put (a repository that may only be read), the restore goes on, and
//! what is condemned stays for a day at least.

use std::time::Duration;

use crate::catalog::Repository;
use crate::catalog::layout::LeaseName;
use crate::catalog::retention::{LeaseRecord, WalRange};
use crate::plan::RestorePlan;
use crate::types::ClusterId;

/// From one beat to the next.
const BEAT: Duration = Duration::from_secs(1800);
/// A repository that does not take a beat within so long is left.
const DEADLINE: Duration = Duration::from_secs(30);

/// Does `work`, and holds leases in these repositories meanwhile. They stay afterwards: recovery begins now.
pub(super) async fn leased<T>(
    repositories: Vec<Repository>,
    cluster: &ClusterId,
    plan: &RestorePlan,
    work: impl Future<Output = T>,
) -> T {
    let wal = plan.wal.iter().map(|need| WalRange { branch: need.branch, from: need.from, to: need.to });
    let wal: Vec<WalRange> = wal.collect();
    let beating = futures_util::future::join_all(repositories.iter().map(|repository| {
        let empty = LeaseRecord::new("restore", repository.writer(), repository.now());
        let record = LeaseRecord { backup: Some(plan.base.label), wal: wal.clone(), ..empty };
        async move { beat(repository, cluster, &record).await }
    }));
    let beating = async {
        beating.await;
        std::future::pending::<std::convert::Infallible>().await
    };
    tokio::select! {
        biased;
        done = work => done,
        never = beating => match never {},
    }
}

async fn beat(repository: &Repository, cluster: &ClusterId, record: &LeaseRecord) {
    let mut lease: Option<LeaseName> = None;
    loop {
        let put = async {
            match &lease {
                None => repository.begin_lease(cluster, record).await,
                Some(lease) => repository.beat(cluster, lease, record).await,
            }
        };
        match tokio::time::timeout(DEADLINE, put).await {
            Ok(Ok(next)) => lease = Some(next),
            Ok(Err(error)) => tracing::debug!(repository = repository.name(), %error, "no lease"),
            Err(_) => tracing::debug!(repository = repository.name(), "no lease within {} s", DEADLINE.as_secs()),
        }
        tokio::time::sleep(BEAT).await;
    }
}
