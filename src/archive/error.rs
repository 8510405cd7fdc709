use std::time::Duration;

use crate::catalog::CatalogError;
use crate::pg::{PgError, ServerErrorKind};
use crate::types::{Branch, ClusterId, Lsn, ParseError, SegmentSize, SystemId, TimelineId};
use crate::wal::receiver::ReceiveError;

use super::receivers::OpenError;
use super::resume::Refusal;

/// Why archiving does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The server, or the way to it.
    #[error(transparent)]
    Server(#[from] PgError),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// A repository could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A repository said nothing in time.
    #[error("repository {repository} gave no answer within {} s", after.as_secs())]
    NoAnswer {
        /// The repository's name in the configuration.
        repository: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// A repository that was refused, and has not been found to be in order since.
    #[error("{reason}")]
    StillRefused {
        /// Why it was.
        reason: String,
    },
    /// Of several repositories none can be used now.
    #[error("no repository can take WAL now: {reasons}")]
    NoRepository {
        /// Which, and why not.
        reasons: String,
    },
    /// The other repositories take WAL, and this one takes it too slowly: what waits for it has used up the memory.
    #[error("repository {repository} does not keep up with the others; it is filled up from another one")]
    FellBehind {
        /// The repository's name in the configuration.
        repository: String,
    },
    /// What a repository holds is not what the other ones hold.
    #[error(
        "{cluster}: the WAL from {from} to {until} in repository {repository} differs from that in repository {other},          which is the server's. Nothing is put into {repository}.\n         hint: two servers have archived under this name. Keep what is there under another cluster name, or take an empty \
         repository in its place"
    )]
    DiffersFromOther {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// The repository that is not what the server is.
        repository: String,
        /// The one it was compared with.
        other: String,
        /// Start of the segment.
        from: Lsn,
        /// End of the stretch that was compared.
        until: Lsn,
    },
    /// A repository lacks WAL that no other one can give it.
    #[error(
        "repository {repository} lacks the WAL of {branch} from {from} on, and no repository that answers holds it; it is \
         filled up when one does"
    )]
    NowhereHeld {
        /// The repository that is to be filled.
        repository: String,
        /// The branch.
        branch: Branch,
        /// The first byte that it lacks.
        from: Lsn,
    },
    /// A repository that would be filled, and the one that holds what it lacks is at odds with itself.
    #[error("repository {repository} is not filled up from {other}, as that is at odds with itself: {source}")]
    CannotGive {
        /// The repository that is to be filled.
        repository: String,
        /// The one that holds the WAL.
        other: String,
        /// What is wrong there.
        source: Box<CatalogError>,
    },
    /// What the repositories that answer need is gone from the server, and one that is away may have it.
    #[error(
        "{cluster}: the server has removed WAL from {from} on that no repository that answers holds, and {away} may hold: \
         waiting for it. The slot keeps what comes.\n         hint: if it is lost for good, take it out of the configuration; a gap is recorded then, and archiving goes on"
    )]
    HeldElsewhere {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// The first byte that is wanted.
        from: Lsn,
        /// The repositories that do not answer.
        away: String,
    },
    /// What the server sent cannot be accepted.
    #[error(transparent)]
    Received(ReceiveError),
    /// The server's bytes are not the archived ones.
    #[error(
        "{cluster}: {source}. Nothing was acknowledged and nothing was stored.\n\
         hint: two servers share this system identifier (a restored copy, or a server rolled back to an older copy). \
         Archive one of them under another cluster name, or in another repository, and take a base backup of it"
    )]
    OtherHistory {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// Where it differs.
        source: ReceiveError,
    },
    /// The server's history cannot be a continuation of the archived one.
    #[error(
        "{cluster}: {source}. Nothing was acknowledged and nothing was stored.\n\
         hint: archive this server under another cluster name, or in another repository, and take a base backup of it"
    )]
    Refused {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// Why.
        source: Refusal,
    },
    /// The server is where the archive was before: nothing that it has differs.
    #[error(
        "{cluster}: the server has written only up to {flushed}, and the archive reaches to {archived}; up to there both are \
         equal. Waiting for it to go on: where it then differs from what is archived, that begins a branch of its own"
    )]
    ServerBehind {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// End of what is archived.
        archived: Lsn,
        /// The server's own flush position.
        flushed: Lsn,
    },
    /// The server's history is archived nowhere that answers, and what a new one is called has to be the same everywhere.
    #[error(
        "the server writes a history that no repository that answers holds, and it begins a branch only when all do: {away}. \
         The slot keeps what comes.\n\
         hint: if that repository is lost for good, take it out of the configuration"
    )]
    NewWhileAway {
        /// Who does not answer, and why.
        away: String,
    },
    /// Of several hosts in the connection string another one answered.
    #[error("another server of the connection string answered in between; asking again who it is")]
    AnotherServer,
    /// The server did not send a segment in time.
    #[error("the server did not send a segment of WAL for a comparison within {} s", after.as_secs())]
    NoDigest {
        /// How long it was waited for.
        after: Duration,
    },
    /// A standby that has not replayed as far as the archive reaches: it will, or it is promoted.
    #[error(
        "the server is a standby that has replayed up to {replayed}, and the archive reaches to {archived}: waiting for \
         it to go on, or to be promoted"
    )]
    StandbyBehind {
        /// End of what is archived.
        archived: Lsn,
        /// The standby's position.
        replayed: Lsn,
    },
    /// Commits are to wait for us, and the server is a standby: nothing ever waits for who streams from one.
    #[error(
        "{cluster} has synchronous = true, and the server at {server} is a standby: no commit ever waits for who streams \
         from a standby, so that nothing would be safer for it.\n\
         hint: let conninfo lead to the primary (several hosts with target_session_attrs=read-write), or set \
         synchronous = false"
    )]
    SynchronousStandby {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// The server.
        server: String,
    },
    /// Another history file is archived under this name.
    #[error(
        "{cluster}: the server's {timeline}.history is not the one that is archived: two servers became timeline \
         {timeline} on their own. Nothing was acknowledged and nothing was stored.\n\
         hint: archive this server under another cluster name, or in another repository, and take a base backup of it"
    )]
    OtherHistoryFile {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// The timeline.
        timeline: TimelineId,
    },
    /// The name belongs to another cluster.
    #[error(
        "{name:?} in repository {repository} is the cluster with system identifier {archived}, but the server at \
         {server} has {got}.\n\
         hint: is this the right server? After initdb or pg_upgrade, give the cluster a new name (name_in_repository)"
    )]
    ForeignCluster {
        /// The cluster's name in the repository.
        name: String,
        /// The repository.
        repository: String,
        /// What the name stands for there.
        archived: SystemId,
        /// What the server says.
        got: SystemId,
        /// The server.
        server: String,
    },
    /// The cluster's segments changed their size.
    #[error(
        "{cluster} is archived with WAL segments of {archived}, but the server has {got}.\n\
         hint: after a change by pg_resetwal give the cluster a new name (name_in_repository) and take a base backup"
    )]
    SegmentSize {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// In the repository.
        archived: SegmentSize,
        /// On the server.
        got: SegmentSize,
    },
    /// A history file that cannot be read.
    #[error("{timeline}.history as the server sent it: {source}")]
    History {
        /// The timeline.
        timeline: TimelineId,
        /// What is wrong.
        source: ParseError,
    },
    /// The server asked for a position that the repository could not confirm in time.
    #[error(
        "the server waits for {position}, which is not durable in the repository yet (durable up to {durable}): the \
         connection is closed so that a shutdown is not held up. The slot keeps the WAL"
    )]
    HeldUp {
        /// What the server had sent when it asked.
        position: Lsn,
        /// What is durable.
        durable: Lsn,
    },
    /// We were asked to stop, and the repository did not take the rest in time.
    #[error(
        "stopped before the WAL from {durable} to {received} was durable: the slot keeps it, and the next start goes on there"
    )]
    StopDeadline {
        /// What had come in.
        received: Lsn,
        /// What is durable.
        durable: Lsn,
    },
    /// Other bytes are archived under a name that these bytes should have had.
    #[error(
        "{existing} is archived with other content; the server's bytes were kept aside as {kept}.\n\
         hint: two servers archive under this name. Archive one of them under another cluster name, or in another repository"
    )]
    Conflict {
        /// What is archived.
        existing: String,
        /// Where ours was kept.
        kept: String,
    },
    /// WAL that the archive needs is gone from the server.
    #[error(
        "{cluster}: the server has removed the WAL of {branch} from {from} to {to}, which is not archived. It is recorded as \
         a gap, and archiving goes on after it.\n\
         hint: take a base backup now (pgkeep backup): nothing after {from} can be restored without a newer one"
    )]
    WalRemoved {
        /// The cluster in the repository.
        cluster: ClusterId,
        /// The branch with the gap.
        branch: Branch,
        /// Its first missing byte.
        from: Lsn,
        /// Where archiving goes on.
        to: Lsn,
    },
    /// A task of ours ended abnormally.
    #[error("a task of the archiver ended abnormally: {0}")]
    Task(String),
}

impl ArchiveError {
    /// For a join: a panic in a task, or its cancellation.
    pub fn task(error: tokio::task::JoinError) -> ArchiveError {
        ArchiveError::Task(error.to_string())
    }

    /// May another attempt, a little later, succeed without anybody doing anything?
    pub fn is_retryable(&self) -> bool {
        match self {
            // A slot that was there a moment ago, before a failover: the next attempt makes it anew.
            Self::Server(error) => error.is_retryable() || error.server_kind() == Some(ServerErrorKind::NoSuchObject),
            Self::Repository(error) => error.is_retryable(),
            Self::Open(error) => !error.is_refusal,
            // The next connection starts at the segment again; a walsender that skips once is a broken connection.
            Self::Received(error) => matches!(error, ReceiveError::OutOfOrder { .. }),
            Self::HeldUp { .. } | Self::StandbyBehind { .. } | Self::WalRemoved { .. } | Self::Task(_) => true,
            Self::NoAnswer { .. }
            | Self::NoRepository { .. }
            | Self::FellBehind { .. }
            | Self::NowhereHeld { .. }
            | Self::CannotGive { .. }
            | Self::HeldElsewhere { .. }
            | Self::ServerBehind { .. }
            | Self::NewWhileAway { .. }
            | Self::AnotherServer
            | Self::NoDigest { .. } => true,
            Self::OtherHistory { .. }
            | Self::DiffersFromOther { .. }
            | Self::StillRefused { .. }
            | Self::Refused { .. }
            | Self::OtherHistoryFile { .. }
            | Self::ForeignCluster { .. }
            | Self::Conflict { .. }
            | Self::SegmentSize { .. }
            | Self::History { .. }
            | Self::SynchronousStandby { .. }
            | Self::StopDeadline { .. } => false,
        }
    }

    /// Does it show that the server is not who it was taken for? Then everything is compared before anybody is refused.
    pub(super) fn asks_who_it_is(&self) -> bool {
        matches!(
            self,
            Self::OtherHistory { .. }
                | Self::Refused { .. }
                | Self::OtherHistoryFile { .. }
                | Self::Conflict { .. }
                | Self::StillRefused { .. }
        )
    }

    /// Is this a refusal that protects what is archived (exit code 4)?
    pub fn protects_data(&self) -> bool {
        matches!(
            self,
            Self::Open(OpenError { is_refusal: true, .. })
                | Self::OtherHistory { .. }
                | Self::DiffersFromOther { .. }
                | Self::StillRefused { .. }
                | Self::Refused { .. }
                | Self::OtherHistoryFile { .. }
                | Self::ForeignCluster { .. }
                | Self::Conflict { .. }
                | Self::SegmentSize { .. }
        )
    }
}

impl ArchiveError {
    /// Must nothing be put into the repository that this is said of, until a person has decided?
    pub(super) fn refuses_repository(&self) -> bool {
        match self {
            Self::Repository(error) => error.is_refusal(),
            error => error.protects_data(),
        }
    }
}

impl From<ReceiveError> for ArchiveError {
    fn from(error: ReceiveError) -> Self {
        Self::Received(error)
    }
}
