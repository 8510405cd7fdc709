//! What a repository holds of the server's path, and what of it has to come again. Reads, and changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::ArchiveError;
use super::branching::Candidate;
use super::fill::Position;
use super::resume::{DeadTail, Held, Overlap, Refusal, Resume, ServerState, resume};
use super::source::Connected;
use super::uploader::HistoryFile;
use crate::catalog::Repository;
use crate::types::{Branch, ClusterId, Digest, Lineage, Lsn, SegmentNumber, SegmentSize, TimelineHistory, TimelineId};
use crate::wal::receiver::Expected;
use crate::wal::{Decoder, PAGE_SIZE};

/// The header of a page that does not begin a segment, in bytes.
const SHORT_PAGE_HEADER: u64 = 24;

/// The server of one connection, as it described itself.
#[derive(Debug, Clone)]
pub(super) struct Served {
    /// The cluster in the repositories.
    pub id: ClusterId,
    /// Its segment size.
    pub size: SegmentSize,
    /// `server_version_num`.
    pub version: u32,
    /// For messages.
    pub server: String,
    /// Its history, and what its slot keeps.
    pub state: ServerState,
    /// The history files of its path, oldest first.
    pub histories: Vec<(TimelineId, Bytes)>,
}

impl Served {
    pub fn new(connected: &Connected, id: ClusterId, server: String) -> Served {
        let (size, version, histories) = (connected.size, connected.version, connected.histories.clone());
        Served { id, size, version, server, state: connected.state(), histories }
    }

    /// The branch that this timeline of the server is.
    pub fn branch(&self, timeline: TimelineId) -> Branch {
        self.state.lineage.branch(timeline)
    }

    /// The branches of the server's history, oldest first.
    pub fn branches(&self) -> Vec<Branch> {
        self.state.history.path().into_iter().map(|(timeline, ..)| self.branch(timeline)).collect()
    }

    /// The newest branch of the server's history, by this lineage.
    pub fn branch_of(&self, lineage: &Lineage) -> Branch {
        lineage.branch(self.state.history.timeline())
    }

    /// The history files that WAL of `timeline` needs: its own and its ancestors'.
    pub fn histories_for(&self, timeline: TimelineId) -> Vec<HistoryFile> {
        let files = self.histories.iter().filter(|(of, _)| *of <= timeline && self.state.history.contains(*of));
        let file = |(of, text): &(TimelineId, Bytes)| {
            let (branch, ancestors) = (self.branch(*of), self.state.lineage.before(*of));
            HistoryFile { branch, ancestors, text: text.clone() }
        };
        files.map(file).collect()
    }
}

/// What a repository holds, branch by branch.
pub(super) struct Archived {
    pub repository: Repository,
    branches: Vec<ArchivedBranch>,
    /// Every branch of which there is anything, and what its history file says.
    known: BTreeMap<Branch, Option<KnownHistory>>,
}

struct KnownHistory {
    history: TimelineHistory,
    ancestors: Lineage,
}

struct ArchivedBranch {
    held: Held,
    /// There is WAL of it.
    has_wal: bool,
    /// Digests of the last segment's beginning, ascending; the last one is that of everything held.
    expected: Vec<Expected>,
    /// End of what is held by more than tails.
    durable: Lsn,
}

/// Where a repository would go on.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The timeline to stream.
    pub timeline: TimelineId,
    /// Start of a segment.
    pub at: Lsn,
    overlap: Option<Overlap>,
    follows: Option<Branch>,
    /// What it holds beyond the fork.
    pub dead_tail: Option<DeadTail>,
}

/// A repository that is ready to go on, and what it holds that has to come again before.
#[derive(Debug)]
pub(super) struct Prepared {
    pub repository: Repository,
    /// Nothing of the server's history is there.
    pub is_empty: bool,
    pub place: Place,
    /// Of which branch the `expected` are; a fork's parent, or the one that goes on.
    pub compares: Branch,
    /// What the server must send again, equal.
    pub expected: Vec<Expected>,
    /// The first record must name one of these, where no byte can be compared.
    pub follows: Vec<Lsn>,
    /// Everything before is durable there; at least `place.at`.
    pub durable_to: Lsn,
    /// Segments of `place.timeline` that have pieces under `open/`.
    pub open_segments: BTreeSet<SegmentNumber>,
}

/// Loads what `repository` holds of the cluster; refuses what belongs to another cluster.
pub(super) async fn load(repository: Repository, served: &Served) -> Result<Archived, ArchiveError> {
    refuse_foreign(&repository, served).await?;
    let (id, history) = (&served.id, &served.state.history);
    let known = known_histories(&repository, id).await?;
    let mut archived = Vec::new();
    for branch in known.keys().copied() {
        if !history.contains(branch.timeline) {
            let held = Held { branch, to: Lsn::ZERO, comparable: false };
            archived.push(ArchivedBranch { held, has_wal: true, expected: Vec::new(), durable: Lsn::ZERO });
            continue;
        }
        if let Some(resume) = repository.resume(id, branch).await? {
            if resume.segment_size != served.size {
                let (cluster, got) = (id.clone(), served.size);
                return Err(ArchiveError::SegmentSize { cluster, archived: resume.segment_size, got });
            }
            let expected: Vec<Expected> =
                resume.expected.iter().map(|(at, digest)| Expected { at: *at, digest: *digest }).collect();
            let held = Held { branch, to: resume.at, comparable: !expected.is_empty() };
            archived.push(ArchivedBranch { held, has_wal: true, expected, durable: resume.durable });
        } else if let Some(to) = repository.gaps_of(id, branch).await?.iter().map(|gap| gap.to).max() {
            let held = Held { branch, to, comparable: false };
            archived.push(ArchivedBranch { held, has_wal: false, expected: Vec::new(), durable: to });
        }
    }
    Ok(Archived { repository, branches: archived, known })
}

impl Archived {
    /// The histories of the server's timelines that are here.
    pub fn candidates(&self, served: &Served) -> Vec<Candidate> {
        let on_path = self.known.iter().filter(|(branch, _)| served.state.history.contains(branch.timeline));
        let candidate = |(branch, known): (&Branch, &Option<KnownHistory>)| Candidate {
            branch: *branch,
            ancestors: known.as_ref().map(|known| known.ancestors.clone()).unwrap_or_default(),
            forked_elsewhere: known.as_ref().is_some_and(|known| forked_elsewhere(&known.history, served)),
        };
        on_path.map(candidate).collect()
    }

    /// Every branch that is here, or that a history file here names as an ancestor.
    pub fn named(&self) -> BTreeSet<Branch> {
        let ancestors = self
            .known
            .values()
            .flatten()
            .flat_map(|known| known.history.ancestors().iter().map(|entry| known.ancestors.branch(entry.timeline)));
        self.known.keys().copied().chain(ancestors).collect()
    }

    /// Is anything of this branch here?
    pub fn knows(&self, branch: Branch) -> bool {
        self.known.contains_key(&branch)
    }

    /// The end of the WAL of a branch, or of a gap behind it; `None` where there is no WAL.
    pub fn held_to(&self, branch: Branch) -> Option<Lsn> {
        self.find(branch).filter(|archived| archived.has_wal).map(|archived| archived.held.to)
    }

    /// The digest of the bytes before `until` in the segment that holds the last of them; `None` where not all of them
    /// are here.
    pub async fn digest_before(
        &self,
        served: &Served,
        branch: Branch,
        until: Lsn,
    ) -> Result<Option<Digest>, ArchiveError> {
        let expected = self.find(branch).and_then(|archived| archived.expected.iter().find(|known| known.at == until));
        if let Some(expected) = expected {
            return Ok(Some(expected.digest));
        }
        let segment = until.segment_before(served.size);
        // invariant: a segment is at most 1 GiB, so offsets in it fit
        let offset = u32::try_from(until.bytes_since(segment.start(served.size)).unwrap_or(0)).unwrap_or(u32::MAX);
        Ok(self.repository.digest_at(&served.id, branch, segment, served.size, offset).await?)
    }

    /// Is what is here under the names of the server's branches of the server's ancestry?
    pub fn compare_histories(&self, served: &Served) -> Result<(), ArchiveError> {
        for (timeline, ..) in served.state.history.path() {
            let Some(Some(known)) = self.known.get(&served.branch(timeline)) else { continue };
            let ancestors = served.state.lineage.before(timeline);
            if forked_elsewhere(&known.history, served) || known.ancestors != ancestors {
                return Err(ArchiveError::OtherHistoryFile { cluster: served.id.clone(), timeline });
            }
        }
        Ok(())
    }

    fn find(&self, branch: Branch) -> Option<&ArchivedBranch> {
        self.branches.iter().find(|archived| archived.held.branch == branch)
    }

    /// Where it would go on with this server.
    pub fn decide(&self, served: &Served, state: &ServerState) -> Result<Place, Refusal> {
        let held: Vec<Held> = self.branches.iter().map(|branch| branch.held).collect();
        match resume(state, &held, served.size) {
            Resume::Stream { timeline, at, overlap, follows, dead_tail } => {
                Ok(Place { timeline, at, overlap, follows, dead_tail })
            }
            Resume::Refused(source) => Err(source),
        }
    }

    /// Is nothing of the cluster there?
    pub fn is_empty(&self) -> bool {
        self.branches.is_empty()
    }

    /// The end of what is held of a branch.
    pub fn end_of(&self, branch: Branch) -> Option<Lsn> {
        self.find(branch).map(|archived| archived.held.to)
    }

    /// Everything that is needed to go on there.
    pub async fn prepare(&self, served: &Served, state: &ServerState) -> Result<Prepared, ArchiveError> {
        let refused = |source| ArchiveError::Refused { cluster: served.id.clone(), source };
        let place = self.decide(served, state).map_err(refused)?;
        let branch = served.branch(place.timeline);
        let (expected, durable) = match place.overlap {
            Some(overlap) => self.expected(served, overlap).await?,
            None => (Vec::new(), None),
        };
        let compares = place.overlap.map_or(branch, |overlap| overlap.branch);
        let durable_to = durable.filter(|_| compares == branch).unwrap_or(place.at).max(place.at);
        let follows = match place.follows {
            Some(parent) => last_records(&self.repository, &served.id, parent, place.at, served.size).await?,
            None => Vec::new(),
        };
        let open_segments = self.repository.open_segments(&served.id, branch, served.size).await?;
        let is_empty = served.branches().into_iter().all(|branch| self.find(branch).is_none());
        let repository = self.repository.clone();
        Ok(Prepared { repository, is_empty, place, compares, expected, follows, durable_to, open_segments })
    }

    /// What the server has to send again, and how much of it is held by more than tails.
    async fn expected(
        &self,
        served: &Served,
        Overlap { branch, until }: Overlap,
    ) -> Result<(Vec<Expected>, Option<Lsn>), ArchiveError> {
        if let Some(archived) =
            self.branches.iter().find(|archived| archived.held.branch == branch && archived.held.to == until)
        {
            return Ok((archived.expected.clone(), Some(archived.durable)));
        }
        // A fork inside a segment: the parent's bytes before it.
        let (id, size, segment) = (&served.id, served.size, until.segment_before(served.size));
        let digest = match self.digest_before(served, branch, until).await? {
            Some(digest) => digest,
            // Without reading nobody could tell whose history this is.
            None if !self.repository.can_read() => {
                return match self.repository.read_segment(id, branch, segment, size, None).await {
                    Err(error) => Err(error.into()),
                    Ok(_) => Ok((Vec::new(), None)),
                };
            }
            None => {
                // The fork lies before the archive's first byte, or within a gap: there is nothing to compare.
                tracing::warn!(cluster = %id, %branch, fork = %until, "nothing is archived before the fork; the new timeline begins uncompared");
                return Ok((Vec::new(), None));
            }
        };
        Ok((vec![Expected { at: until, digest }], None))
    }
}

impl Prepared {
    /// A repository that holds nothing, whose stream would begin at `at`; for tests of what becomes of it.
    #[cfg(test)]
    pub fn empty(repository: Repository, timeline: TimelineId, at: Lsn) -> Prepared {
        let place = Place { timeline, at, overlap: None, follows: None, dead_tail: None };
        let (compares, durable_to, open_segments) = (Branch::first(timeline), at, BTreeSet::new());
        let (expected, follows) = (Vec::new(), Vec::new());
        Prepared { repository, is_empty: true, place, compares, expected, follows, durable_to, open_segments }
    }

    /// How far it holds the server's path.
    pub fn position(&self) -> Position {
        Position { on: self.place.timeline, to: self.durable_to }
    }

    /// Where the compared bytes end; `None` where there is nothing to compare.
    pub fn until(&self) -> Option<Lsn> {
        self.expected.last().map(|expected| expected.at)
    }

    /// The branch that was left at a segment's border, just before `place.at`: nothing of it comes again.
    pub fn left(&self) -> Option<Branch> {
        self.place.follows
    }
}

/// The records that the first record from `end` on may name as its predecessor; `end` is the end of an archived segment.
/// The last one that begins before `end`, whole or not; and, because a crash may have left an unfinished record there that
/// the server then replaced, the last whole one. Empty where the segment's records cannot be read.
pub(super) async fn last_records(
    repository: &Repository,
    id: &ClusterId,
    branch: Branch,
    end: Lsn,
    size: SegmentSize,
) -> Result<Vec<Lsn>, ArchiveError> {
    let segment = end.segment_before(size);
    let read = repository.read_segment(id, branch, segment, size, None).await?;
    if read.bytes.len() as u64 != size.bytes() {
        return Ok(Vec::new());
    }
    let mut decoder = Decoder::new(segment.start(size), size);
    decoder.push(read.bytes);
    let mut last = None;
    loop {
        match decoder.next() {
            Ok(Some(record)) => last = Some(record.start),
            Ok(None) => break,
            Err(error) => {
                tracing::error!(cluster = %id, %branch, %error, "the last archived segment is damaged");
                return Ok(Vec::new());
            }
        }
    }
    let mut records: Vec<Lsn> = last.into_iter().collect();
    if decoder.inside_record() && last.is_some() {
        // It begins where the last whole one ends, behind the page's header if that is a page's start.
        let begins = decoder.end_of_last_record();
        let in_page = begins.get().is_multiple_of(PAGE_SIZE);
        records.push(if in_page { begins.advance(SHORT_PAGE_HEADER) } else { begins });
    }
    Ok(records)
}

/// A name in a repository stands for one cluster.
async fn refuse_foreign(repository: &Repository, served: &Served) -> Result<(), ArchiveError> {
    let id = &served.id;
    let archived = repository.clusters_named(&id.name).await?;
    match archived.first() {
        Some(first) if !archived.contains(id) => Err(ArchiveError::ForeignCluster {
            name: id.name.to_string(),
            repository: repository.name().to_owned(),
            archived: first.system,
            got: id.system,
            server: served.server.clone(),
        }),
        _ => Ok(()),
    }
}

/// What a history file says counts, not how it is written: an ancestor's that the server has lost was derived from a
/// descendant's.
fn forked_elsewhere(history: &TimelineHistory, served: &Served) -> bool {
    let servers = served.state.history.ancestor_history(history.timeline());
    servers.is_some_and(|servers| servers.path() != history.path())
}

/// The branches that are there, and their history files as far as they open.
async fn known_histories(
    repository: &Repository,
    id: &ClusterId,
) -> Result<BTreeMap<Branch, Option<KnownHistory>>, ArchiveError> {
    let mut known = BTreeMap::new();
    for branch in repository.all_branches(id).await? {
        let read =
            if branch.timeline == TimelineId::FIRST { Ok(None) } else { repository.get_history_of(id, branch).await };
        let read = match read {
            Err(error) if error.is_damage() => {
                tracing::error!(cluster = %id, %branch, %error, "an archived history file does not open");
                None
            }
            read => read?,
        };
        let history = read.and_then(|(text, ancestors)| {
            let history = TimelineHistory::parse(branch.timeline, &text).ok()?;
            Some(KnownHistory { history, ancestors })
        });
        known.insert(branch, history);
    }
    Ok(known)
}
