//! Folders to list. Each ends in `/`, so that a name that merely begins alike is not listed with it.

use super::hex_u32;
use super::{BackupLabel, Branch, ClusterId, ClusterName, Id128, SegmentName, SystemId};

/// What was found out about the store: a prefix, not a folder.
pub fn store_verdicts() -> &'static str {
    "format/store-"
}

/// The content keys of one day, whose number (days since 1970-01-01, UTC) begins their ids: a prefix, not a folder.
pub fn keys_of_day(day: u32) -> String {
    format!("keys/{day:08x}")
}

/// The envelopes of all keys, and what lies in the folder below.
pub fn keys() -> &'static str {
    "keys/"
}

/// For whom content keys are wrapped: every list there was.
pub fn recipients() -> &'static str {
    "keys/recipients/"
}

/// The clusters of this name: their system identifiers are the folders below.
pub fn clusters_named(name: &ClusterName) -> String {
    format!("{name}/")
}

/// Everything of one cluster.
pub fn cluster(cluster: &ClusterId) -> String {
    format!("{cluster}/")
}

/// History files.
pub fn histories(cluster: &ClusterId) -> String {
    format!("{cluster}/timeline/")
}

/// The branches that have complete segments.
pub fn wal(cluster: &ClusterId) -> String {
    format!("{cluster}/wal/")
}

/// The logs of a branch that have complete segments.
pub fn wal_logs(cluster: &ClusterId, branch: Branch) -> String {
    format!("{cluster}/wal/{branch}/")
}

/// The complete segments of one log.
pub fn wal_log(cluster: &ClusterId, branch: Branch, log: u32) -> String {
    format!("{cluster}/wal/{branch}/{log:08X}/")
}

/// The complete segment's object or parts: a prefix, not a folder.
pub fn wal_segment(cluster: &ClusterId, branch: Branch, segment: SegmentName) -> String {
    format!("{cluster}/wal/{branch}/{:08X}/{segment}.", segment.log)
}

/// The branches that have ranges or tails.
pub fn open(cluster: &ClusterId) -> String {
    format!("{cluster}/open/")
}

/// Ranges and tails of a branch.
pub fn open_branch(cluster: &ClusterId, branch: Branch) -> String {
    format!("{cluster}/open/{branch}/")
}

/// Ranges and tails of one segment: a prefix, not a folder.
pub fn open_segment(cluster: &ClusterId, branch: Branch, segment: SegmentName) -> String {
    format!("{cluster}/open/{branch}/{segment}.")
}

/// Base backups: one folder each.
pub fn backups(cluster: &ClusterId) -> String {
    format!("{cluster}/backup/")
}

/// One base backup's start, pieces and manifest.
pub fn backup(cluster: &ClusterId, label: BackupLabel) -> String {
    format!("{cluster}/backup/{label}/")
}

/// The packs that one backup wrote.
pub fn packs(cluster: &ClusterId, label: BackupLabel) -> String {
    format!("{cluster}/pack/{label}/")
}

/// Plans of expiry, and what of them goes.
pub fn expiry_plans(cluster: &ClusterId) -> String {
    format!("{cluster}/expire/")
}

/// Holds and their releases.
pub fn holds(cluster: &ClusterId) -> String {
    format!("{cluster}/hold/")
}

/// What writers noted of what was done: a folder for each.
pub fn events(cluster: &ClusterId) -> String {
    format!("{cluster}/event/")
}

/// What one writer noted.
pub fn events_of(cluster: &ClusterId, writer: Id128) -> String {
    format!("{cluster}/event/{writer}/")
}

/// Results of verifications.
pub fn verifications(cluster: &ClusterId) -> String {
    format!("{cluster}/verify/")
}

/// Results of drills.
pub fn drills(cluster: &ClusterId) -> String {
    format!("{cluster}/drill/")
}

/// Leases of all names.
pub fn leases(cluster: &ClusterId) -> String {
    format!("{cluster}/lease/")
}

/// The packs of all base backups.
pub fn all_packs(cluster: &ClusterId) -> String {
    format!("{cluster}/pack/")
}

/// Indexes of all branches.
pub fn indexes(cluster: &ClusterId) -> String {
    format!("{cluster}/index/")
}

/// Kept `.partial` and `.backup` files of all branches.
pub fn kept_files(cluster: &ClusterId) -> String {
    format!("{cluster}/partial/")
}

/// Indexes of one branch.
pub fn index_of(cluster: &ClusterId, branch: Branch) -> String {
    format!("{cluster}/index/{branch}/")
}

/// Names of relations, by when they were noted.
pub fn relations(cluster: &ClusterId) -> String {
    format!("{cluster}/relations/")
}

/// Gap records of all branches.
pub fn gaps(cluster: &ClusterId) -> String {
    format!("{cluster}/gap/")
}

/// Gap records of one branch.
pub fn gaps_of(cluster: &ClusterId, branch: Branch) -> String {
    format!("{cluster}/gap/{branch}/")
}

/// Conflicts of all branches.
pub fn conflicts(cluster: &ClusterId) -> String {
    format!("{cluster}/conflict/")
}

fn last_part(folder: &str) -> Option<&str> {
    folder.strip_suffix('/')?.rsplit('/').next()
}

/// Reads a listed folder below [`clusters_named`].
pub fn read_system(folder: &str) -> Option<SystemId> {
    last_part(folder)?.parse().ok()
}

/// Reads a listed folder of the repository's root; `None` for folders that are no cluster's.
pub fn read_cluster_name(folder: &str) -> Option<ClusterName> {
    last_part(folder)?.parse().ok()
}

/// Reads a listed folder below [`wal`] or [`open`].
pub fn read_branch(folder: &str) -> Option<Branch> {
    last_part(folder)?.parse().ok()
}

/// Reads a listed folder below [`wal_logs`].
pub fn read_log(folder: &str) -> Option<u32> {
    hex_u32(last_part(folder)?)
}

/// Reads a listed folder below [`backups`].
pub fn read_label(folder: &str) -> Option<BackupLabel> {
    last_part(folder)?.parse().ok()
}

/// The beats of one lease.
pub fn lease(cluster: &ClusterId, name: &str) -> String {
    format!("{cluster}/lease/{name}/")
}
