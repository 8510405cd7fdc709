//! From a target in words to a plan with a manifest: reads what planning asks for, and decides nothing itself.
//!
//! What always holds (P2): a plan that is handed out names a base backup whose manifest, tables and packs were all seen
//! under their lengths and headers; WAL that could not be read to the end of its chain is told to the planner as damage, with
//! the object's name. A base backup that is damaged is left out, said, and planned around.
//!
//! The index narrows, the WAL decides: where an index says that a transaction or restore point lies, the base backup before
//! it is asked first, and its WAL read up to there; what is not found there is sought as if there were no index ([`super::said`]).
//!
//! Nothing is changed anywhere; every future may be dropped.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt};

use super::RestoreError;
use super::said;
use crate::catalog::inventory::{ClusterInventory, Stretch};
use crate::catalog::records::{BackupInfo, Manifest};
use crate::catalog::{CatalogError, Repository};
use crate::plan::{
    EndOfWal, NoKind, Options, Outcome, PlanError, Planning, Reading, RestorePlan, Seen, Stop, StopAt, Target,
};
use crate::types::{Branch, ClusterId, ClusterName, Id128, Lsn, SegmentNumber, SegmentSize};
use crate::wal::{Decoder, PAGE_SIZE, may_be_fact};

/// Segments are read ahead up to this many bytes, and at least one.
const AHEAD_BYTES: u64 = 128 << 20;
const AHEAD_MAX: u64 = 6;
/// Footers of packs and tables that are asked for at the same time.
const CHECKS_AT_ONCE: usize = 8;
/// Damaged objects that are named with an answer.
const NAMED_MAX: usize = 5;

/// A target that can be reached, and the base backup's manifest.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// What has to be done.
    pub plan: RestorePlan,
    /// What there is to unpack.
    pub manifest: Manifest,
}

/// How far the reading of WAL is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRead {
    /// Gone through.
    pub done: u64,
    /// Of the chain that is being read; often the answer comes earlier.
    pub total: u64,
}

/// Which cluster is meant: the only one of that name, or the only one there is.
///
/// # Errors
/// [`RestoreError::NoCluster`], [`RestoreError::SeveralClusters`], what the repository says.
pub async fn find_cluster(repository: &Repository, name: Option<&ClusterName>) -> Result<ClusterId, RestoreError> {
    let found = match name {
        Some(name) => repository.clusters_named(name).await?,
        None => repository.clusters().await?,
    };
    match (found.as_slice(), name) {
        ([only], _) => Ok(only.clone()),
        ([], name) => {
            let known = if name.is_some() { repository.clusters().await? } else { Vec::new() };
            Err(RestoreError::no_cluster(repository.name(), name, &known))
        }
        (several, _) => Err(RestoreError::SeveralClusters {
            repository: repository.name().to_owned(),
            found: several.iter().map(ClusterId::to_string).collect::<Vec<_>>().join(", "),
            hint: match name {
                None => "say which with --cluster",
                Some(_) => "servers of different system identifiers were archived under one name",
            },
        }),
    }
}

/// Whether and how a target can be reached; the inner error is the answer no.
///
/// `progress` is called now and then while WAL is read.
///
/// # Errors
/// What the repository says. Damage is no error here: it is a part of the answer.
pub async fn resolve(
    repository: &Repository,
    cluster: &ClusterId,
    target: &Target,
    options: &Options,
    progress: &(dyn Fn(WalRead) + Send + Sync),
) -> Result<Result<Resolved, Box<PlanError>>, RestoreError> {
    let inventory = repository.load(cluster).await?;
    resolve_in(repository, inventory, target, options, progress).await
}

/// [`resolve`] over a picture that was taken already.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_in(
    repository: &Repository,
    mut inventory: ClusterInventory,
    target: &Target,
    options: &Options,
    progress: &(dyn Fn(WalRead) + Send + Sync),
) -> Result<Result<Resolved, Box<PlanError>>, RestoreError> {
    if !repository.can_read() {
        return Err(RestoreError::WriteOnlyKey { repository: repository.name().to_owned() });
    }
    let cluster = inventory.id.clone();
    let mut remarks: Vec<String> = inventory
        .damaged
        .iter()
        .take(NAMED_MAX)
        .map(|object| format!("{} is damaged and was not used: {}", object.name, object.reason))
        .collect();
    loop {
        let mut keys = Keys::default();
        let mut plan = match search(repository, &inventory, target, options, progress, &mut keys).await? {
            Ok(plan) => plan,
            Err(mut no) => {
                no.hints.append(&mut remarks);
                return Ok(Err(no));
            }
        };
        let label = plan.base.label;
        match manifest(repository, &cluster, &plan).await {
            Ok((manifest, of_base)) => {
                plan.knows_keys(of_base);
                let of_wal: Vec<Id128> = keys.of(&plan).collect();
                plan.knows_keys(of_wal);
                if plan.stop == Stop::Immediate {
                    plan.stop = Stop::At(consistent(repository, &inventory, &plan).await?);
                }
                plan.knows_manifest(&manifest);
                plan.warnings.append(&mut remarks);
                return Ok(Ok(Resolved { plan, manifest }));
            }
            Err(error) if error.is_damage() || error.is_not_found() => {
                tracing::warn!(%label, "this base backup cannot be used: {error}");
                remarks.push(format!("base backup {label} cannot be used: {error}"));
                inventory.backups.retain(|backup| backup.label != label); // one fewer each time, so this ends
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Content keys that opened WAL: of which branch, by the beginnings of the first and the last segment in a row.
#[derive(Debug, Default)]
struct Keys(Vec<(Branch, Lsn, Lsn, BTreeSet<Id128>)>);

impl Keys {
    fn met(&mut self, branch: Branch, at: Lsn, keys: BTreeSet<Id128>) {
        match self.0.last_mut() {
            Some((of, _, last, known)) if *of == branch && *last <= at && *known == keys => *last = at,
            _ => self.0.push((branch, at, at, keys)),
        }
    }

    /// Those of the WAL that a plan needs.
    fn of<'k>(&'k self, plan: &'k RestorePlan) -> impl Iterator<Item = Id128> + use<'k> {
        let is_needed = move |branch: Branch, first: Lsn, last: Lsn| {
            plan.wal.iter().any(|need| need.branch == branch && need.from <= last && first < need.to)
        };
        let needed = self.0.iter().filter(move |(branch, first, last, _)| is_needed(*branch, *first, *last));
        needed.flat_map(|(.., keys)| keys.iter().copied())
    }
}

/// Plans over one picture of the repository.
async fn search(
    repository: &Repository,
    inventory: &ClusterInventory,
    target: &Target,
    options: &Options,
    progress: &(dyn Fn(WalRead) + Send + Sync),
    keys: &mut Keys,
) -> Result<Result<RestorePlan, Box<PlanError>>, RestoreError> {
    let mut planning = match Planning::begin(inventory, target, options) {
        Ok(planning) => planning,
        Err(no) => return Ok(Err(no)),
    };
    let tip = planning.chain().path.tip;
    let said = said::of(repository, inventory, (tip, planning.oldest()), target).await;
    if let Some(mut near) = said.as_ref().and_then(|said| planning.near(said.at)) {
        let end = read(repository, inventory, &mut near, progress, keys).await?;
        match near.finish(&end) {
            Outcome::Yes(mut plan) => {
                plan.warnings.extend(said.and_then(|said| said.warning));
                return Ok(Ok(*plan));
            }
            Outcome::No(no) if no.kind == NoKind::Subtransaction => return Ok(Err(no)),
            Outcome::No(_) | Outcome::Again(_) => {
                tracing::debug!("the WAL does not say what its index says: it is searched from the beginning");
            }
        }
    }
    loop {
        let end = read(repository, inventory, &mut planning, progress, keys).await?;
        match planning.finish(&end) {
            Outcome::Yes(mut plan) => {
                plan.warnings.extend(said.and_then(|said| said.warning));
                return Ok(Ok(*plan));
            }
            Outcome::No(mut no) => {
                no.hints.extend(said::elsewhere(repository, inventory, tip, target, &no).await);
                return Ok(Err(no));
            }
            Outcome::Again(next) => planning = *next,
        }
    }
}

/// A part of a chain within one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    branch: Branch,
    segment: SegmentNumber,
    /// First byte that is not wanted.
    to: Lsn,
}

/// Cuts stretches, whose borders are borders of segments, into segments.
fn parts(stretches: &[Stretch], size: SegmentSize) -> impl Iterator<Item = Part> {
    stretches.iter().filter(|stretch| stretch.from < stretch.to).flat_map(move |stretch| {
        let (first, last) = (stretch.from.segment(size).get(), stretch.to.segment_before(size).get());
        let (branch, end) = (stretch.branch, stretch.to);
        (first..=last).map(SegmentNumber::new).map(move |segment| Part {
            branch,
            segment,
            to: end.min(segment.end(size)),
        })
    })
}

/// The record that makes the base backup consistent. With `recovery_target = 'immediate'` the server would stop before the
/// record that follows it, and fail where that one is not archived yet; stopping after this one needs nothing further.
async fn consistent(
    repository: &Repository,
    inventory: &ClusterInventory,
    plan: &RestorePlan,
) -> Result<StopAt, RestoreError> {
    let (label, size) = (plan.base.label, plan.base.segment_size);
    let stretches: Vec<Stretch> =
        plan.wal.iter().map(|need| Stretch { branch: need.branch, from: need.from, to: need.to }).collect();
    let Some(from) = stretches.first().map(|stretch| stretch.from) else {
        return Err(RestoreError::Contradiction { label, reason: "no WAL belongs to it".to_owned() });
    };
    let begin = first_read(&plan.base, from);
    let mut decoder = Decoder::new(begin, size).expecting(Some(inventory.id.system), None).only(|_, _| false);
    for part in parts(&stretches, size) {
        let path = inventory.path_of(part.branch);
        let mut segment =
            repository.read_segment(&inventory.id, part.branch, part.segment, size, path.as_ref()).await?;
        let wanted = part.to.bytes_since(part.segment.start(size)).unwrap_or(0);
        segment.bytes.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        decoder.push(behind(segment.bytes, part.segment.start(size), begin));
        let damaged = |source| RestoreError::Wal { label, source };
        while decoder.next().map_err(damaged)?.is_some() {}
    }
    match decoder.start_of_last_record().map(|start| (start, decoder.end_of_last_record())) {
        Some((record, end)) if end >= plan.base.stop => Ok(StopAt { record, inclusive: true, needed_to: end }),
        _ => {
            let reason = format!("no record of its WAL ends at {}, where it should be consistent", plan.base.stop);
            Err(RestoreError::Contradiction { label, reason })
        }
    }
}

/// The page from which on recovery reads: what lies before it in the first segment, from `from` on, may be damaged.
fn first_read(base: &BackupInfo, from: Lsn) -> Lsn {
    Lsn::new(base.start.get() / PAGE_SIZE * PAGE_SIZE).max(from)
}

/// Of `bytes`, which begin at `at`, those from `begin` on.
fn behind(mut bytes: Vec<u8>, at: Lsn, begin: Lsn) -> Vec<u8> {
    let before = usize::try_from(begin.bytes_since(at).unwrap_or(0)).unwrap_or(usize::MAX);
    bytes.split_off(before.min(bytes.len()))
}

/// Reads the chain in question and pushes what it holds, until the planner has enough or the WAL ends.
async fn read(
    repository: &Repository,
    inventory: &ClusterInventory,
    planning: &mut Planning<'_>,
    progress: &(dyn Fn(WalRead) + Send + Sync),
    keys: &mut Keys,
) -> Result<EndOfWal, CatalogError> {
    let chain = planning.chain().clone();
    let size = chain.base.segment_size;
    let Some(from) = chain.wal.first().map(|stretch| stretch.from) else { return Ok(EndOfWal::default()) };
    let total = chain.held_to.bytes_since(from).unwrap_or(0);
    let begin = first_read(&chain.base, from);
    let mut decoder = Decoder::new(begin, size).expecting(Some(inventory.id.system), Some(chain.path.tip.timeline));
    if !planning.wants_every_record() {
        decoder = decoder.only(may_be_fact);
    }
    let ahead = (AHEAD_BYTES / size.bytes()).clamp(1, AHEAD_MAX);
    let mut segments = stream::iter(parts(&chain.wal, size))
        .map(|part| async move {
            let path = inventory.path_of(part.branch);
            let read = repository.read_segment(&inventory.id, part.branch, part.segment, size, path.as_ref()).await;
            (part, read)
        })
        .buffered(usize::try_from(ahead).unwrap_or(1));
    let mut damage = None;
    'chain: while let Some((part, read)) = segments.next().await {
        let mut segment = match read {
            Ok(segment) => segment,
            Err(error) if ends_a_chain(&error) => {
                damage = Some(error.to_string());
                break;
            }
            Err(error) => return Err(error),
        };
        let begins = part.segment.start(size);
        keys.met(part.branch, begins, std::mem::take(&mut segment.keys));
        let wanted = part.to.bytes_since(begins).unwrap_or(0);
        let short = (segment.bytes.len() as u64) < wanted;
        if short {
            let at = begins.advance(segment.bytes.len() as u64);
            let mut why = format!("the WAL of branch {} could only be read up to {at}", part.branch);
            for object in segment.damaged.iter().take(NAMED_MAX) {
                why = format!("{why}; {} does not open: {}", object.name, object.reason);
            }
            damage = Some(why);
        }
        segment.bytes.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        decoder.push(behind(segment.bytes, begins, begin));
        loop {
            let seen = match decoder.next() {
                Ok(None) => break,
                Ok(Some(record)) => Seen::of(&record),
                Err(error) => Err(error),
            };
            match seen {
                Ok(seen) => {
                    if planning.push(seen) == Reading::Enough {
                        break 'chain;
                    }
                }
                Err(error) => {
                    damage = Some(format!("{error} (read from {})", segment.sources.join(", ")));
                    break 'chain;
                }
            }
        }
        if let Some(at) = decoder.ended_at().filter(|at| *at < chain.held_to) {
            damage.get_or_insert_with(|| {
                format!(
                    "the WAL ends at {at} in zeros, before the archive does (read from {})",
                    segment.sources.join(", ")
                )
            });
        }
        if damage.is_some() {
            break;
        }
        progress(WalRead { done: part.to.bytes_since(from).unwrap_or(0), total });
    }
    let last_record = decoder.start_of_last_record().map(|start| (start, decoder.end_of_last_record()));
    Ok(EndOfWal { last_record, damage })
}

/// Whether an error says something about the archive, which no other try changes, and not about us or the store.
fn ends_a_chain(error: &CatalogError) -> bool {
    error.is_damage() || matches!(error, CatalogError::Disagreement { .. } | CatalogError::SegmentSize { .. })
}

/// The base backup's manifest, after everything that it names was seen to be there and to open, and the content keys of that.
async fn manifest(
    repository: &Repository,
    cluster: &ClusterId,
    plan: &RestorePlan,
) -> Result<(Manifest, BTreeSet<Id128>), CatalogError> {
    let manifest = repository.get_manifest(cluster, plan.base.label).await?;
    let mut keys = BTreeSet::new();
    let packs = stream::iter(&manifest.packs).map(|pack| repository.open_pack(cluster, pack));
    let mut packs = packs.buffer_unordered(CHECKS_AT_ONCE);
    while let Some(checked) = packs.next().await {
        keys.extend(checked?.key_id());
    }
    drop(packs);
    let parts = manifest.tables.iter().chain(&manifest.server_manifest);
    let mut parts =
        stream::iter(parts).map(|part| repository.open_part(cluster, part)).buffer_unordered(CHECKS_AT_ONCE);
    while let Some(checked) = parts.next().await {
        keys.extend(checked?.key_id());
    }
    drop(parts);
    Ok((manifest, keys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TimelineId;

    #[test]
    fn stretches_are_cut_into_segments() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let (one, two) = (Branch::first(TimelineId::FIRST), Branch::first(TimelineId::new(2).unwrap()));
        let lsn = |text: &str| text.parse::<Lsn>().unwrap();
        let stretches = [
            Stretch { branch: one, from: lsn("0/100000"), to: lsn("0/300000") },
            Stretch { branch: two, from: lsn("0/300000"), to: lsn("0/300010") },
            Stretch { branch: two, from: lsn("0/400000"), to: lsn("0/400000") },
        ];
        let cut: Vec<_> = parts(&stretches, size).map(|part| (part.branch, part.segment.get(), part.to)).collect();
        assert_eq!(cut, [(one, 1, lsn("0/200000")), (one, 2, lsn("0/300000")), (two, 3, lsn("0/300010"))]);
    }
}
