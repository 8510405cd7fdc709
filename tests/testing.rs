//! `pgkeep::testing`, as the guide shows it (docs/testing-recovery.md): a recovery test to start one's own from.

mod support;

use pgkeep::testing::{Options, Protected, TestingError};
use support::{any_major, covered};

fn options() -> Options {
    covered(any_major());
    Options {
        installation: Some(any_major().clone()),
        program: Some(env!("CARGO_BIN_EXE_pgkeep").into()),
        ..Options::default()
    }
}

/// A release goes wrong; the orders come back as they were before it. Then the server is lost, and every order is there whose
/// commit has returned.
#[test]
fn orders_survive_a_bad_release_and_the_loss_of_the_server() -> Result<(), TestingError> {
    let mut shop = Protected::start(Options { synchronous: true, ..options() })?;
    shop.sql("CREATE TABLE orders (id int PRIMARY KEY, paid bool NOT NULL)")?;
    shop.sql("INSERT INTO orders SELECT id, true FROM generate_series(1, 1000) AS id")?;

    let before = shop.restore_point("before the release")?;
    shop.sql("UPDATE orders SET paid = false")?; // the migration that nobody meant
    let restored = shop.restore(&before)?;
    assert_eq!(restored.sql("SELECT count(*) FROM orders WHERE paid")?, "1000");
    drop(restored);

    shop.kill_pgkeep();
    shop.start_pgkeep()?;
    shop.sql("INSERT INTO orders VALUES (1001, true)")?; // returns when it is in the repository
    shop.lose_server()?;
    let restored = shop.restore("latest")?;
    assert_eq!(restored.sql("SELECT count(*), max(id) FROM orders")?, "1001|1001");

    // What cannot be is said, with the words of the program.
    let refused = shop.restore("xid:4000000").expect_err("there is no such transaction");
    assert!(matches!(&refused, TestingError::Command { status, .. } if status.code() == Some(1)), "{refused}");
    assert!(matches!(shop.sql("SELECT 1"), Err(TestingError::Lost)));
    let dir = shop.dir().to_owned();
    drop(shop);
    assert_eq!(restored.sql("SELECT 1")?, "1", "a restored server stays as long as it is held");
    drop(restored);
    assert!(!dir.exists());
    Ok(())
}
