//! Which kind of sealed object each name stands for.

use super::layout::{ClusterObject, Disputed, PartKind};
use crate::seal::Kind;

/// What kind of sealed object this is.
pub(super) fn kind_of(object: &ClusterObject) -> Kind {
    match object {
        ClusterObject::History(_) | ClusterObject::Conflict(_, Disputed::History, _) => Kind::History,
        ClusterObject::Wal(..) | ClusterObject::Open(..) | ClusterObject::Conflict(_, Disputed::Range(_), _) => {
            Kind::WalRange
        }
        ClusterObject::Tail(..) => Kind::WalTail,
        ClusterObject::WalFile(..) | ClusterObject::Conflict(_, Disputed::File(_), _) => Kind::WalFile,
        ClusterObject::Pack(_) => Kind::Pack,
        ClusterObject::Index(..) => Kind::Index,
        ClusterObject::Start(_)
        | ClusterObject::Manifest(_)
        | ClusterObject::Gap(..)
        | ClusterObject::Relations(_)
        | ClusterObject::ExpiryPlan(_)
        | ClusterObject::ExpiryGoing(_)
        | ClusterObject::Hold(_)
        | ClusterObject::HoldReleased(_) => Kind::Record,
        ClusterObject::Lease(_) => Kind::Lease,
        ClusterObject::Event(..) => Kind::Event,
        ClusterObject::Verification(_) | ClusterObject::Drill(_) => Kind::Verification,
        ClusterObject::Part(part) => match part.kind {
            PartKind::Files => Kind::FileTable,
            PartKind::Tags => Kind::BlockTags,
            PartKind::ServerManifest => Kind::ServerManifest,
        },
    }
}
