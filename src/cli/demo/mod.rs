//! `pgkeep demo`: the whole story on a throwaway cluster: archive, back up, lose a table, get it back.
//!
//! Every step that is shown with a `$` is that command of this very binary, run as a person would run it, as the user
//! that runs the server. What is proved is read from both servers by SQL.
//! Ctrl-C, an error and the end are one path: processes that were started are stopped, and the directory goes, unless
//! `--keep` was given. After a kill -9 the directory and the servers in it stay.

mod stage;
mod writer;

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use self::stage::{Bucket, Stage, Story};
use self::writer::Writer;
use super::{CliError, Context, Exit, output, stop_on_signal};
use crate::pg::instance::{Installation, StopMode};

/// How long rows are written before the accident, and after it.
const BEFORE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_millis(1500);
/// How long anything may take: a demo that hangs shows nothing.
const PATIENCE: Duration = Duration::from_secs(90);
/// What the story shows of a plan.
const PLAN_LINES: &[&str] = &["target", "base", "stop", "included", "excluded", "wal", "fetch"];
/// Rows that make the cluster worth backing up.
const CUSTOMERS: u32 = 200_000;
/// What every customer's name begins with: it must not be found in the repository.
const PLAINTEXT: &str = "Customer No. ";

/// `pgkeep demo`: the whole story on a throwaway cluster: archive, back up, lose a table, get it back.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Needs PostgreSQL's server programs (found in /usr/lib/postgresql/*/bin, in PATH, or where $PGKEEP_PG_BINDIRS says). \
Touches no existing cluster: everything happens in a temporary directory, on a Unix socket there.

With --repo the repository is a bucket: below a prefix of its own, which is emptied at the end. Credentials come from the \
environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say).

Examples:
  pgkeep demo
  pgkeep demo --repo s3://scratch --endpoint http://127.0.0.1:9000")]
pub struct Args {
    /// A bucket for the repository: s3://BUCKET or s3://BUCKET/PREFIX (gs:// and az:// too)
    #[arg(long, value_name = "URL")]
    pub repo: Option<String>,
    /// The address of the bucket's server, if it is not the provider's own
    #[arg(long, value_name = "URL", requires = "repo")]
    pub endpoint: Option<String>,
    /// The bucket's region
    #[arg(long, value_name = "NAME", requires = "repo")]
    pub region: Option<String>,
    /// Keep the directory with the cluster, the repository and the restored server, and say where it is
    #[arg(long)]
    pub keep: bool,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let stop = stop_on_signal()?;
    let mut story = Story::new(context.output.clone());
    let installation = Installation::find(None).map_err(CliError::usage)?;
    let bucket = match &args.repo {
        None => None,
        Some(url) => Some(Bucket::new(url, args.endpoint.as_deref(), args.region.as_deref())?),
    };
    let mut stage = Stage::new(installation, bucket, stop.clone()).await?;
    let told = tokio::select! {
        biased;
        () = stop.cancelled() => Err(CliError::failed(anyhow::anyhow!("the demo was interrupted"))),
        told = tell(&mut story, &mut stage) => told,
    };
    let dir = stage.dir().to_path_buf();
    let emptied = if args.keep { Ok(()) } else { stage.empty_bucket().await };
    stage.leave(args.keep || (told.is_err() && std::env::var_os("PGKEEP_DEMO_KEEP").is_some()))?;
    let proof = told?;
    emptied?;
    story.plain("");
    if args.keep {
        story.plain(format!("Everything is still in {}; nothing of it runs.", dir.display()));
    } else {
        story.plain("Nothing of this is left: servers stopped, directory removed.");
    }
    context.output.document(&Document { ok: true, seconds: story.seconds(), proof, kept: args.keep.then_some(dir) });
    Ok(Exit::Done)
}

#[derive(Debug, Serialize)]
struct Document {
    ok: bool,
    seconds: f64,
    #[serde(flatten)]
    proof: Proof,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<std::path::PathBuf>,
}

/// What the two servers said.
#[derive(Debug, Serialize)]
struct Proof {
    server_version: String,
    target: String,
    acknowledged_before: usize,
    restored_rows: u64,
    written_after: u64,
    cluster_bytes: u64,
    repository_bytes: u64,
    restore_seconds: f64,
}

async fn tell(story: &mut Story, stage: &mut Stage) -> Result<Proof, CliError> {
    // ---- a cluster
    story.plain(format!("pgkeep {}, and a throwaway cluster in {}", env!("CARGO_PKG_VERSION"), stage.dir().display()));
    story.plain("");
    let as_user = stage.user().map(|user| format!(", run by user {user}")).unwrap_or_default();
    stage.boot()?;
    stage.sql("CREATE TABLE customers (id int PRIMARY KEY, name text, balance int)")?;
    stage.sql(&format!(
        "INSERT INTO customers SELECT n, '{PLAINTEXT}' || md5(n::text), n % 1000 FROM generate_series(1, {CUSTOMERS}) n"
    ))?;
    stage.sql("CREATE TABLE orders (n bigint PRIMARY KEY, at timestamptz NOT NULL)")?;
    stage.sql("CREATE TABLE journal (n bigint PRIMARY KEY, at timestamptz NOT NULL)")?;
    let version = stage.version();
    story.line(format!(
        "PostgreSQL {version} is up{as_user}; it has {}",
        output::count(u64::from(CUSTOMERS), "customer")
    ));

    // ---- protect it
    let conninfo = stage.conninfo();
    let repository = stage.repository();
    let repository: Vec<&str> = repository.iter().map(String::as_str).collect();
    story.command(&format!("pgkeep init --pg 'host=... user=postgres' --repo {}", repository.join(" ")));
    let init = ["init", "--yes", "--pg", &conninfo, "--repo"];
    stage.pgkeep(&[&init[..], &repository].concat()).await?;
    story.line("key, encrypted repository, configuration and replication slot are made");
    story.command("pgkeep check");
    let checked = stage.pgkeep_json(&["check"]).await?;
    let items = checked["items"].as_array().map_or(0, Vec::len) as u64;
    story.line(format!("{} looked at, none wrong", output::count(items, "thing")));
    story.command("pgkeep run &");
    stage.start_archiver()?;
    let mut writer = Writer::start(&conninfo).await?;
    story.line("WAL streams into the repository; a client commits order after order, each with the time");
    story.command("pgkeep backup");
    stage.pgkeep(&["backup"]).await?;
    let listed = stage.pgkeep_json(&["list"]).await?;
    let backup = &listed["clusters"][0]["backups"][0];
    let (bytes, stored) = (number(&backup["bytes"]), number(&backup["stored_bytes"]));
    let label = backup["label"].as_str().unwrap_or_default();
    story.line(format!("base backup {label}: {}, sealed in {}", output::bytes(bytes), output::bytes(stored)));

    // ---- the accident
    tokio::time::sleep(BEFORE).await;
    // First who was acknowledged, then the instant: one that is acknowledged in between may have been committed after it.
    let acknowledged = writer.acknowledged();
    let target = stage.sql("SELECT clock_timestamp()")?;
    stage.sql("DROP TABLE orders")?;
    story.blank();
    story.line(format!("psql> DROP TABLE orders;   -- an accident, just after {target}"));
    story.line(format!("{} were committed before it", output::count(acknowledged as u64, "order")));
    tokio::time::sleep(AFTER).await;
    let written = writer.stop().await?;
    let expected = stage.sql(&format!("{JOURNAL} WHERE pg_xact_commit_timestamp(xmin) <= '{target}'"))?;
    let after =
        stage.sql(&format!("SELECT count(*) FROM journal WHERE pg_xact_commit_timestamp(xmin) > '{target}'"))?;
    let after: u64 = after.parse().unwrap_or(0);
    story.line(format!("the client went on: {} since, in another table", output::count(after, "commit")));
    wait_until_archived(stage, &target).await?;
    let stopped = stage.stop_archiver().await?;
    stage.stop_server(StopMode::Fast)?;
    story.line(format!("pgkeep run stopped in {}, all of it durable; the server is down", output::duration(stopped)));
    story.blank();

    // ---- get it back
    story.command(&format!("pgkeep plan --to '{target}'"));
    let plan = stage.pgkeep(&["plan", "--to", &target]).await?;
    for line in plan.lines().filter(|line| PLAN_LINES.iter().any(|word| line.starts_with(word))) {
        story.quote(line);
    }
    story.command(&format!("pgkeep restore --to '{target}' --pgdata restored --action promote"));
    let begun = std::time::Instant::now();
    stage.pgkeep(&["-q", "restore", "--to", &target, "--pgdata", "restored", "--action", "promote"]).await?;
    let restore_time = begun.elapsed();
    story.line(format!("{} restored in {}", output::bytes(bytes), output::duration(restore_time)));
    if let Some(said) = stage.verify_backup()? {
        story.command("pg_verifybackup restored");
        story.line(said);
    }
    story.command("pg_ctl -D restored start");
    let begun = std::time::Instant::now();
    stage.start_restored(PATIENCE)?;
    story.line(format!("replayed to the target and open for writing after {}", output::duration(begun.elapsed())));
    story.blank();

    // ---- prove it
    let proof = prove(story, stage, &expected, acknowledged, &written, after)?;
    let (repository_bytes, cluster_bytes) = (stage.repository_bytes(PLAINTEXT).await?, bytes);
    story.line(format!(
        "repository: {} for {} of cluster and all its WAL; no customer's name is found in it",
        output::bytes(repository_bytes),
        output::bytes(cluster_bytes)
    ));
    Ok(Proof {
        server_version: version,
        target,
        acknowledged_before: acknowledged,
        restored_rows: proof,
        written_after: after,
        cluster_bytes,
        repository_bytes,
        restore_seconds: restore_time.as_secs_f64(),
    })
}

/// Count and fingerprint of the journal's rows.
const JOURNAL: &str = "SELECT count(*), md5(coalesce(string_agg(n || ' ' || at, ',' ORDER BY n), '')) FROM journal";

/// Asks the restored server, and holds its answers against what the lost one said and the client was told. Returns the
/// number of orders that are there again.
fn prove(
    story: &mut Story,
    stage: &Stage,
    expected: &str,
    acknowledged: usize,
    written: &[i64],
    after: u64,
) -> Result<u64, CliError> {
    let wrong = |what: String| CliError::failed(anyhow::anyhow!("the proof failed: {what}"));
    let orders = stage.restored_sql("SELECT count(*), coalesce(max(n), 0), max(at) FROM orders")?;
    let mut columns = orders.split('|');
    let mut next = || columns.next().unwrap_or_default().to_owned();
    let (count, newest, at) = (next(), next(), next());
    let count: u64 = count.parse().map_err(|_| wrong(format!("orders answered {orders:?}")))?;
    // Numbers are given one after the other by one client, so the count of a prefix says which rows there are.
    let complete = newest == count.to_string() && count >= acknowledged as u64;
    let known = written.iter().take_while(|n| u64::try_from(**n).is_ok_and(|n| n <= count)).count() as u64;
    if !complete || known != count {
        return Err(wrong(format!(
            "{acknowledged} orders were acknowledged, {count} are there, the newest is {newest}"
        )));
    }
    story.line(format!("orders is back: {count} rows, the newest of {at}; every acknowledged one is there"));
    let journal = stage.restored_sql(JOURNAL)?;
    if journal != expected {
        return Err(wrong(format!("the journal should be {expected}, and is {journal}")));
    }
    let rows = journal.split('|').next().unwrap_or_default();
    story.line(format!(
        "journal: {rows} rows, the same as those committed before by hash; of the {after} after it none"
    ));
    let customers = stage.restored_sql("SELECT count(*), sum(balance) FROM customers")?;
    let sum: u64 = (1..=u64::from(CUSTOMERS)).map(|n| n % 1000).sum();
    if customers != format!("{CUSTOMERS}|{sum}") {
        return Err(wrong(format!("customers answered {customers:?}")));
    }
    story.line(format!("customers: all {CUSTOMERS}, and their balances add up"));
    Ok(count)
}

/// The plan needs to see that nothing before the target is missing: something after it has to be archived.
async fn wait_until_archived(stage: &mut Stage, target: &str) -> Result<(), CliError> {
    let target: jiff::Timestamp = with_minutes(target).parse().map_err(CliError::failed)?;
    let since = std::time::Instant::now();
    loop {
        let listed = stage.pgkeep_json(&["list"]).await?;
        let newest = listed["clusters"][0]["restorable"]["to_time"].as_str().and_then(|time| time.parse().ok());
        if newest.is_some_and(|newest: jiff::Timestamp| newest > target) {
            return Ok(());
        }
        if since.elapsed() > PATIENCE {
            return Err(CliError::failed(anyhow::anyhow!("what was committed after {target} does not arrive")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// PostgreSQL writes an offset of whole hours with two digits, which RFC 3339 does not allow.
fn with_minutes(text: &str) -> String {
    let whole_hours = text.len() >= 3 && matches!(text.as_bytes().get(text.len() - 3), Some(b'+' | b'-'));
    if whole_hours { format!("{text}:00") } else { text.to_owned() }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_servers_write_them() {
        for (text, want) in [
            ("2026-11-21 05:00:00.5+00", "2026-11-21T05:00:00.5Z"),
            ("2026-11-21 10:30:00.5+05:30", "2026-11-21T05:00:00.5Z"),
            ("2026-11-21 02:00:00.5-03", "2026-11-21T05:00:00.5Z"),
        ] {
            assert_eq!(with_minutes(text).parse::<jiff::Timestamp>().unwrap().to_string(), want);
        }
    }
}
