//! How long a decision about a large repository takes, and how much memory: 1,000 base backups, 2 million WAL objects and 10
//! million references to packs.
//!
//! ```text
//! cargo run --release --example expiry_speed [BACKUPS [SEGMENTS [PACKS OF A BACKUP]]]
//! ```

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use pgkeep::catalog::inventory::{BranchInventory, Place};
use pgkeep::catalog::layout::PackName;
use pgkeep::catalog::records::{BackupInfo, ServerParameters};
use pgkeep::catalog::survey::{References, Started, Stored, Survey, WalObject, condensed, runs_of};
use pgkeep::retention::{Policy, decide};
use pgkeep::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentNumber, SegmentSize, SystemId, TimelineId};

fn argument(at: usize, otherwise: u64) -> u64 {
    std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn memory(what: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with(what)).unwrap_or_default().to_owned()
}

fn main() {
    let (backups, segments, packs) = (argument(1, 1000), argument(2, 2_000_000), argument(3, 10_000));
    let size = SegmentSize::new(16 << 20).expect("a size");
    let branch = Branch::first(TimelineId::FIRST);
    let id = ClusterId { name: "main".parse().expect("a name"), system: SystemId::new(7) };
    let begin = Timestamp::from_second(1_700_000_000).expect("a time");
    let hour = |hour: u64| begin + SignedDuration::from_hours(hour as i64);
    let mut survey = Survey::new(id);
    survey.inventory.segment_size = Some(size);
    // A base backup a day, and the WAL in between.
    let (each, hours) = ((segments / backups).max(4), backups * 24);
    let wal = (0..segments).map(|number| WalObject {
        segment: SegmentNumber::new(number),
        from: 0,
        to: 16 << 20,
        place: Place::Wal,
        token: None,
        len: 4 << 20,
        put_at: hour(number * hours / segments).as_second(),
    });
    let wal: Vec<WalObject> = wal.collect();
    let mut entry = BranchInventory::new(branch);
    entry.pieces = condensed(runs_of(&wal, size), size);
    survey.inventory.branches.insert(branch, entry);
    survey.wal.insert(branch, wal);
    // Each stores a tenth of its packs anew and names the others of those before.
    let own = (packs / 10).max(1);
    for number in 0..backups {
        let (started_at, stopped_at) = (hour(number * 24), hour(number * 24 + 2));
        let label = BackupLabel::at(started_at);
        for pack in 1..=own {
            let name = PackName { label, number: pack as u32 };
            survey.packs.push(Stored { name, token: None, len: 32 << 20, put_at: stopped_at.as_second() });
        }
        let end = (number + 1) * own;
        let references = (end.saturating_sub(packs)..end).map(|place| place as u32).collect();
        survey.manifests.insert(label, References { packs: references, ..References::default() });
        survey.starts.insert(label, Started { parents: Some(Vec::new()), newest: stopped_at.as_second() });
        survey.inventory.backups.push(BackupInfo {
            label,
            system: SystemId::new(7),
            branch,
            timeline: TimelineId::FIRST,
            start: Lsn::new(number * each * size.bytes() + 40),
            stop: Lsn::new((number * each + 3) * size.bytes() + 40),
            started_at,
            stopped_at,
            server_version: 150_000,
            segment_size: size,
            bytes: 1 << 40,
            stored_bytes: 1 << 35,
            files: 1_000_000,
            tablespaces: Vec::new(),
            flagged: None,
            parameters: ServerParameters::default(),
        });
    }
    let references: usize = survey.manifests.values().map(|references| references.packs.len()).sum();
    let policy = Policy {
        window: SignedDuration::from_hours(7 * 24),
        daily: 14,
        weekly: 8,
        monthly: 12,
        yearly: 7,
        at_least: 2,
    };
    println!(
        "{backups} base backups, {segments} WAL objects, {} packs, {references} references; in memory: {}",
        survey.packs.len(),
        memory("VmRSS")
    );
    let since = Instant::now();
    let decision = decide(&survey, &policy, hour(hours));
    println!(
        "decided in {:.2} s: {} base backups go, {} WAL objects, {} packs; at most in memory: {}",
        since.elapsed().as_secs_f64(),
        decision.goes().len(),
        decision.wal.iter().map(|wal| wal.objects).sum::<u64>(),
        decision.garbage.packs.len(),
        memory("VmHWM")
    );
}
