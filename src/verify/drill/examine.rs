//! A restored directory, started and looked at. Blocks; ends soon after it is to stop.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::settings::settings;
use super::tool::{Ran, run};
use super::{DrillError, RECOVERY_DEADLINE, Seen, Setup, TOOL_DEADLINE};
use crate::catalog::verification::{DrillCheck, Outcome, Phase};
use crate::pg::instance::{Instance, InstanceError, Started, StopMode};
use crate::plan::{Stop, StopAt, TransactionEnd};
use crate::types::{Lsn, SegmentSize};

/// What is looked at.
#[derive(Debug)]
pub(super) struct Subject {
    pub dir: PathBuf,
    pub data: PathBuf,
    pub setup: Setup,
    pub stop_at: Stop,
    pub last_included: Option<TransactionEnd>,
    pub wal_bytes: u64,
    pub segment_size: SegmentSize,
}

/// What was seen.
#[derive(Debug)]
pub(super) struct Examined {
    pub checks: Vec<DrillCheck>,
    pub phases: Vec<Phase>,
}

/// A part of a wait that can be interrupted.
const SLICE: Duration = Duration::from_millis(300);
/// What a question about the server itself may take.
const QUESTION: Duration = Duration::from_secs(120);
/// What one assertion may take.
const ASSERTION: Duration = Duration::from_secs(3600);
/// From the acceptance of connections on the server is asked so often whether it has reached the target.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Starts it, looks at it, stops it. What is wrong with what was restored is in the checks.
pub(super) fn examine(subject: &Subject, stop: &CancellationToken) -> Result<Examined, DrillError> {
    let mut seen = Seen::default();
    let mut server = Instance::attach(subject.setup.installation.clone(), &subject.data)?;
    for setting in settings(&subject.dir, &subject.data, subject.setup.installation.major) {
        server.set(&setting);
    }
    let look = Look { subject, stop };
    if look.recover(&mut server, &mut seen)? {
        look.at_target(&server, &mut seen)?;
        if look.promote(&mut server, &mut seen)? {
            look.commit(&server, &mut seen)?;
            look.amcheck(&server, &mut seen)?;
            look.assertions(&server, &mut seen)?;
            look.checksums(&mut server, &mut seen)?;
        }
    }
    server.stop(StopMode::Immediate)?;
    let Seen { checks, phases } = seen;
    Ok(Examined { checks, phases })
}

struct Look<'a> {
    subject: &'a Subject,
    stop: &'a CancellationToken,
}

impl Look<'_> {
    fn go_on(&self) -> Result<(), DrillError> {
        if self.stop.is_cancelled() { Err(DrillError::Stopped) } else { Ok(()) }
    }

    fn psql(&self, server: &Instance, database: &str, sql: &str, deadline: Duration) -> Result<Ran, DrillError> {
        let mut command = server.client("psql")?;
        command.args(["-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1"]);
        command.args(["-U", &self.subject.setup.user, "-d", database, "-c", sql]);
        run(command, deadline, self.stop)
    }

    fn ask(&self, server: &Instance, sql: &str) -> Result<Ran, DrillError> {
        self.psql(server, "postgres", sql, QUESTION)
    }

    /// Until the target is reached, and recovery pauses there.
    fn recover(&self, server: &mut Instance, seen: &mut Seen) -> Result<bool, DrillError> {
        let begun = Instant::now();
        let mut started = server.start_within(SLICE);
        loop {
            self.go_on()?;
            match started {
                Ok(Started::AcceptsConnections) => break,
                Err(InstanceError::Deadline { .. }) if begun.elapsed() < RECOVERY_DEADLINE => {}
                Ok(Started::StoppedByItself) => {
                    seen.check(
                        "recovery",
                        Outcome::Failed,
                        format!("the server stopped by itself: {}", last_words(server)),
                    );
                    return Ok(false);
                }
                Err(InstanceError::Deadline { .. } | InstanceError::StartFailed { .. }) => {
                    seen.check("recovery", Outcome::Failed, last_words(server));
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
            started = server.wait_until_ready(SLICE);
        }
        loop {
            self.go_on()?;
            if !server.is_running() {
                seen.check("recovery", Outcome::Failed, last_words(server));
                return Ok(false);
            }
            let paused = self.ask(server, "SELECT pg_is_wal_replay_paused()")?;
            if paused.success && paused.out == "t" {
                break;
            }
            if begun.elapsed() > RECOVERY_DEADLINE
                || !paused.success && begun.elapsed() > QUESTION && server.is_running()
            {
                seen.check("recovery", Outcome::Failed, format!("the target was not reached: {}", paused.said()));
                return Ok(false);
            }
            std::thread::sleep(ASK_EVERY);
        }
        seen.phase("recovery", begun, self.subject.wal_bytes);
        seen.check("recovery", Outcome::Passed, "the server reached its target and paused");
        Ok(true)
    }

    /// Where replay ended, against what the plan had said.
    fn at_target(&self, server: &Instance, seen: &mut Seen) -> Result<(), DrillError> {
        let Stop::At(stop_at) = self.subject.stop_at else { return Ok(()) };
        let ran = self.ask(server, "SELECT pg_last_wal_replay_lsn()")?;
        let Ok(replayed) = ran.out.parse::<Lsn>() else {
            seen.check("stop", Outcome::Failed, format!("the server does not say where it is: {}", ran.said()));
            return Ok(());
        };
        let found = format!("replay ended at {replayed}; the plan stops {stop_at}", stop_at = words(&stop_at));
        let outcome =
            if is_there(&stop_at, replayed, self.subject.segment_size) { Outcome::Passed } else { Outcome::Failed };
        seen.check("stop", outcome, found);
        Ok(())
    }

    fn promote(&self, server: &mut Instance, seen: &mut Seen) -> Result<bool, DrillError> {
        self.go_on()?;
        let begun = Instant::now();
        match server.promote() {
            Ok(()) => {
                seen.phase("promote", begun, 0);
                Ok(true)
            }
            Err(error) => {
                seen.check("promote", Outcome::Failed, error.to_string());
                Ok(false)
            }
        }
    }

    /// The last commit that the plan had promised.
    fn commit(&self, server: &Instance, seen: &mut Seen) -> Result<(), DrillError> {
        let Some(last) = self.subject.last_included else {
            seen.check("commit", Outcome::Skipped, "no transaction lies between the base backup and the target");
            return Ok(());
        };
        let next = self.ask(server, "SELECT pg_snapshot_xmax(pg_current_snapshot())")?;
        let full = next.out.parse::<u64>().ok().and_then(|next| full_xid(next, last.xid));
        let Some(full) = full else {
            let found = format!("transaction {} of the plan is in the future: {}", last.xid, next.said());
            seen.check("commit", Outcome::Failed, found);
            return Ok(());
        };
        let status = self.ask(server, &format!("SELECT pg_xact_status('{full}'::xid8)"))?;
        let wanted = if last.aborted { "aborted" } else { "committed" };
        let outcome = match status.out.as_str() {
            found if status.success && found == wanted => Outcome::Passed,
            "" if status.success => Outcome::Skipped, // so old that the server does not know any more
            _ => Outcome::Failed,
        };
        let time = last.time;
        seen.check(
            "commit",
            outcome,
            format!("transaction {} of {time}, the last of the plan: {}", last.xid, status.said()),
        );
        Ok(())
    }

    /// Structures of tables and indexes.
    fn amcheck(&self, server: &Instance, seen: &mut Seen) -> Result<(), DrillError> {
        let available = self.ask(server, "SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'")?;
        if available.out != "1" {
            seen.check("amcheck", Outcome::Skipped, "the extension amcheck is not installed with this server");
            return Ok(());
        }
        let begun = Instant::now();
        if self.subject.setup.installation.program("pg_amcheck").is_file() {
            let mut command = server.client("pg_amcheck")?;
            command.args(["--all", "--install-missing", "--no-password", "--jobs=2", "-U", &self.subject.setup.user]);
            let ran = run(command, TOOL_DEADLINE, self.stop)?;
            let outcome = if ran.success { Outcome::Passed } else { Outcome::Failed };
            // What it found goes to standard output, what kept it from looking to the other one.
            let said = if ran.out.is_empty() { ran.said() } else { Ran { err: String::new(), ..ran.clone() }.said() };
            let found = if ran.success { "pg_amcheck found tables and indexes whole".to_owned() } else { said };
            seen.check("amcheck", outcome, found);
        } else {
            let all = self.ask(server, "SELECT datname FROM pg_database WHERE datallowconn")?;
            let mut wrong = if all.success { None } else { Some(all.said()) };
            for database in all.out.lines().filter(|_| all.success) {
                let ran = self.psql(server, database, CHECK_INDEXES, TOOL_DEADLINE)?;
                if !ran.success {
                    wrong = wrong.or(Some(format!("database {database}: {}", ran.said())));
                }
            }
            let outcome = if wrong.is_none() { Outcome::Passed } else { Outcome::Failed };
            seen.check("amcheck", outcome, wrong.unwrap_or_else(|| "all B-tree indexes are whole".to_owned()));
        }
        seen.phase("amcheck", begun, 0);
        Ok(())
    }

    /// What the user says must be true.
    fn assertions(&self, server: &Instance, seen: &mut Seen) -> Result<(), DrillError> {
        let begun = Instant::now();
        let Setup { assertions, database, user, .. } = &self.subject.setup;
        for (number, sql) in (1..).zip(assertions) {
            let mut command = server.client("psql")?;
            command.env("PGOPTIONS", "-c default_transaction_read_only=on");
            command.args([
                "-X",
                "-A",
                "-t",
                "-q",
                "-w",
                "-v",
                "ON_ERROR_STOP=1",
                "-U",
                user,
                "-d",
                database,
                "-c",
                sql,
            ]);
            let ran = run(command, ASSERTION, self.stop)?;
            let holds = ran.success && ran.out == "t";
            let outcome = if holds { Outcome::Passed } else { Outcome::Failed };
            let found = if holds { sql.clone() } else { format!("{sql}: {}", ran.said()) };
            seen.check(&format!("assertion {number}"), outcome, found);
        }
        if !assertions.is_empty() {
            seen.phase("assertions", begun, 0);
        }
        Ok(())
    }

    /// Every page, once the server has stopped in good order.
    fn checksums(&self, server: &mut Instance, seen: &mut Seen) -> Result<(), DrillError> {
        let on = self.ask(server, "SHOW data_checksums")?;
        let begun = Instant::now();
        self.go_on()?;
        server.stop(StopMode::Fast)?;
        if on.out != "on" {
            seen.check("checksums", Outcome::Skipped, "the cluster has no page checksums");
            return Ok(());
        }
        let mut command = self.subject.setup.installation.command("pg_checksums")?;
        command.args(["--check", "-D"]).arg(&self.subject.data);
        let ran = run(command, TOOL_DEADLINE, self.stop)?;
        let outcome = if ran.success { Outcome::Passed } else { Outcome::Failed };
        let found = if ran.success { "every page has its checksum".to_owned() } else { ran.said() };
        seen.check("checksums", outcome, found);
        seen.phase("checksums", begun, 0);
        Ok(())
    }
}

/// What PostgreSQL 13 has instead of pg_amcheck.
const CHECK_INDEXES: &str = "CREATE EXTENSION IF NOT EXISTS amcheck; \
    SELECT bt_index_check(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam \
    WHERE a.amname = 'btree' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid";

/// Why a server ended, as its log says it.
fn last_words(server: &Instance) -> String {
    let log = server.log();
    let said = |word: &str| log.lines().rev().find(|line| line.contains(word)).map(str::to_owned);
    let said = said("FATAL:").or_else(|| said("PANIC:")).or_else(|| said("ERROR:"));
    // What restore_command said comes before that.
    let hint = log.lines().rev().find(|line| line.starts_with("error:")).map(|line| format!(" ({line})"));
    let said = said.unwrap_or_else(|| log.lines().last().unwrap_or("its log is empty").to_owned());
    format!("the server ended before its target: {said}{}", hint.unwrap_or_default())
}

fn words(stop: &StopAt) -> String {
    let StopAt { record, inclusive, needed_to } = stop;
    if *inclusive {
        format!("behind the record at {record}, which ends at {needed_to}")
    } else {
        format!("before the record at {record}")
    }
}

/// Whether replay ended where it should have: behind the record and not further than its end, or before it.
fn is_there(stop: &StopAt, replayed: Lsn, size: SegmentSize) -> bool {
    if !stop.inclusive {
        return replayed <= stop.record;
    }
    // The server counts up to where the next record may begin; behind a switch that is the next segment.
    let aligned = Lsn::new(stop.needed_to.get().saturating_add(7) & !7);
    stop.record < replayed && (replayed <= aligned || replayed == stop.record.segment(size).next().start(size))
}

/// The 64-bit number of a transaction that ended before `next` was the next one to begin; `None`: it lies in the future.
fn full_xid(next: u64, xid: u32) -> Option<u64> {
    let same_epoch = next & !0xFFFF_FFFF | u64::from(xid);
    if same_epoch < next { Some(same_epoch) } else { same_epoch.checked_sub(1 << 32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_transactions_wrap() {
        assert_eq!(full_xid(1000, 999), Some(999));
        assert_eq!(full_xid((3 << 32) + 10, 9), Some((3 << 32) + 9));
        assert_eq!(full_xid((3 << 32) + 10, 0xFFFF_FFF0), Some((2 << 32) + 0xFFFF_FFF0));
        assert_eq!(full_xid(10, 11), None);
    }

    #[test]
    fn replay_ends_behind_the_record_or_before_it() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let at = |record, inclusive, needed_to| StopAt {
            record: Lsn::new(record),
            inclusive,
            needed_to: Lsn::new(needed_to),
        };
        let stop = at(1000, true, 1052);
        for (replayed, there) in
            [(1000, false), (1052, true), (1056, true), (1057, false), (1 << 20, true), (2 << 20, false)]
        {
            assert_eq!(is_there(&stop, Lsn::new(replayed), size), there, "{replayed}");
        }
        let before = at(1000, false, 1052);
        assert!(is_there(&before, Lsn::new(1000), size) && !is_there(&before, Lsn::new(1001), size));
    }
}
