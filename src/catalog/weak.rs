//! Names in a store where two who create one name at the same time may both be told that they did.
//!
//! There nobody relies on a name. Whatever somebody else could want to put under the same name goes to a name of its own,
//! `<name>~<token>`, whose token is a digest of the object's random header: no two sealings share one, and a put that is
//! repeated finds its own bytes. Then every name of the object is listed, and the others are compared as
//! [`super::writer`] compares what is in its way.
//!
//! What always holds (P6), as long as a listing shows what was put before it began: of two contents at most one is
//! confirmed. Who confirms has put first and listed after; so of two who race the one who lists last has the other's name on
//! his list. He keeps his content aside under `conflict/`, withdraws the name that nobody confirmed, and names both. Two may
//! do that at the same time: then neither is confirmed, and both contents lie under `conflict/`.
//! A name that may still be withdrawn is no reason to put nothing: who finds his content under somebody else's name puts it
//! all the same, unless that name is older than [`RELIED_ON_AFTER`] by the store's own clock. Names are withdrawn within
//! [`WITHDRAWN_WITHIN`] of the first try to put them, or never; and only by who put them: what was there under our own name
//! before we began was another run's, which may have confirmed it.
//! What is weaker than in a store that creates exclusively: a crash between put and withdrawal leaves a second content
//! under a name. Readers compare all copies of a name before they believe one, refuse both, and name them; one of
//! them has to be removed by hand. And what two put within an hour is stored twice.
//! What nobody else can want is put under its own name: content keys (random ids), conflicts (named by their content).
//! Cancellation: as a crash.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::CatalogError;
use super::layout::{ClusterObject, CopyToken, Name, Object};
use super::reader::Piece;
use super::records::{self, Record};
use super::repository::{Opened, Repository, RepositoryFormat};
use super::writer::{Found, Identity, SealedObject};
use crate::seal::{Header, Kind};
use crate::store::{Body, Created, Key, ListRequest, ObjectMeta, Op, Store, StoreError, pages};
use crate::types::{Digest, Id128};

/// From the first try to put an object on, this long its name may be withdrawn.
const WITHDRAWN_WITHIN: Duration = Duration::from_secs(15 * 60);
/// A name that is older than this will not be withdrawn: room for [`WITHDRAWN_WITHIN`], and for a last request on its way.
const RELIED_ON_AFTER: SignedDuration = SignedDuration::from_secs(60 * 60);

/// The name under which an object with this header is put.
pub(super) fn own_name(name: &Name, header: &[u8]) -> Name {
    let digest = Digest::of(header);
    let mut token = [0; 16];
    token.iter_mut().zip(digest.as_bytes()).for_each(|(to, from)| *to = *from);
    name.copy(CopyToken::of(Id128::new(token)))
}

/// The header of a sealed object.
fn header_of(body: &Body) -> Vec<u8> {
    let bytes = body.chunks().iter().flat_map(|chunk| chunk.iter().copied());
    bytes.take(Header::LEN).collect()
}

/// A sealed object's puts in one repository.
#[derive(Debug, Clone, Copy)]
pub(super) struct Puts {
    first: Instant,
    confirmed: bool,
}

impl Default for Puts {
    fn default() -> Self {
        Puts { first: Instant::now(), confirmed: false }
    }
}

/// What else is there of an object that somebody puts.
enum Beside {
    Nothing,
    /// The same content. `will_stay`: nobody can withdraw it any more.
    Same {
        name: Name,
        will_stay: bool,
    },
    Damaged(Name, CatalogError),
    Other(Name, Identity, Id128),
}

/// What tells contents of one object apart, by its kind.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    Note(Identity),
    Plaintext(Digest),
}

impl Repository {
    /// Whether names are to be told apart by tokens.
    pub(super) fn names_are_shared(&self) -> bool {
        !self.store().creates_exclusively()
    }

    /// Every name of an object, its own and its copies', with when it was put by the store's clock.
    pub(super) async fn names_of(&self, object: &Object) -> Result<Vec<(Name, Timestamp)>, CatalogError> {
        let listed = pages(self.store().as_ref(), ListRequest::flat(object.to_string())).await;
        let listed = listed.map_err(|source| self.in_store(source))?;
        if let Some(newest) = listed.objects.iter().map(|meta| meta.modified).max() {
            self.store_was_at(newest);
        }
        let named = |meta: &ObjectMeta| Some((Name::parse(meta.key.as_str()).ok()?, meta.modified));
        Ok(listed.objects.iter().filter_map(named).filter(|(name, _)| name.object == *object).collect())
    }

    /// What is there of the object besides `ours`, and whether that is. What somebody withdraws in this moment is not there.
    async fn beside(
        &self,
        object: &SealedObject,
        ours: &Name,
        identity: &Identity,
    ) -> Result<(Beside, bool), CatalogError> {
        let mut found = Beside::Nothing;
        let names = self.names_of(&object.name.object).await?;
        let ours_is_there = names.iter().any(|(name, _)| name == ours);
        for (name, put_at) in names {
            if name == *ours {
                continue;
            }
            match self.identity_of(&name, object.kind).await {
                Ok((theirs, _)) if theirs == *identity => {
                    let will_stay = self.store_time().duration_since(put_at) > RELIED_ON_AFTER;
                    if matches!(found, Beside::Nothing) || will_stay {
                        found = Beside::Same { name, will_stay };
                    }
                }
                Ok((theirs, their_writer)) => return Ok((Beside::Other(name, theirs, their_writer), ours_is_there)),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => found = Beside::Damaged(name, error),
                Err(error) => return Err(error),
            }
        }
        Ok((found, ours_is_there))
    }

    /// [`super::writer`]'s put of what somebody else may have put, in such a store. Of [`Found::Other`] the caller sees to
    /// it that the content is kept, and calls [`Repository::give_up`].
    pub(super) async fn put_or_compare_beside(
        &self,
        object: &SealedObject,
        identity: &Identity,
    ) -> Result<Found, CatalogError> {
        let ours = own_name(&object.name, &object.header);
        let is_open = matches!(object.name.object, Object::Of(_, ClusterObject::Open(..)));
        // Looking first keeps a whole segment from being stored twice, and from lying beside another one at all. A range of
        // the open segment is waited for, and is removed soon: it is only looked at afterwards, as it must be.
        if !is_open {
            let (beside, ours_is_there) = self.beside(object, &ours, identity).await?;
            // A copy has the name that its original's header gives it, also when another run makes it: what was there before
            // we began may be confirmed, so it is not ours to withdraw.
            if ours_is_there && !object.was_begun_in(self.format().repository) {
                object.puts_in(self.format().repository, |puts| puts.confirmed = true);
            }
            match beside {
                Beside::Same { name, will_stay: true } => match self.sync_object(&name).await {
                    Err(error) if error.is_not_found() => {} // swept in this moment
                    synced => return synced.map(|()| Found::Same),
                },
                Beside::Other(theirs, identity, writer) => return Ok(Found::Other(theirs, identity, writer)),
                Beside::Nothing | Beside::Same { .. } | Beside::Damaged(..) => {}
            }
        }
        object.puts_in(self.format().repository, |_| ()); // counts from here
        let created = match self.put_bytes(&ours, object.body.clone()).await {
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => return Err(self.taken(&ours)),
            created => created?,
        };
        let found = match (self.beside(object, &ours, identity).await?.0, created) {
            (Beside::Other(theirs, identity, writer), _) => return Ok(Found::Other(theirs, identity, writer)),
            (Beside::Same { will_stay: true, .. }, _)
                if !object.puts_in(self.format().repository, |puts| puts.confirmed) =>
            {
                self.withdraw(&ours).await?; // superfluous
                return Ok(Found::Same);
            }
            (Beside::Damaged(name, error), _) => {
                Found::Beside { damaged: format!("{name}: {error}"), copy: ours.to_string() }
            }
            (Beside::Same { .. }, _) | (Beside::Nothing, Created::AlreadyThere) => Found::Same,
            (Beside::Nothing, Created::New) => Found::New,
        };
        object.puts_in(self.format().repository, |puts| puts.confirmed = true);
        Ok(found)
    }

    /// Other content is there, under the name `theirs`: ours, which is kept elsewhere by now, loses the name that nobody
    /// confirmed. In a store that creates exclusively it never had one.
    pub(super) async fn give_up(&self, object: &SealedObject, theirs: &Name) -> Result<(), CatalogError> {
        if !self.names_are_shared() {
            return Ok(());
        }
        let ours = own_name(&object.name, &object.header);
        let puts = object.puts_in(self.format().repository, |puts| *puts);
        match puts.confirmed || puts.first.elapsed() > WITHDRAWN_WITHIN {
            true => tracing::error!(object = %ours, other = %theirs, "two contents of one object; both stay"),
            false => self.withdraw(&ours).await?,
        }
        Ok(())
    }

    async fn withdraw(&self, ours: &Name) -> Result<(), CatalogError> {
        self.store().delete(&self.key_of(ours)?).await.map_err(|source| self.in_store(source))
    }

    /// The put of a record. The same record there is fine; beside another one ours is withdrawn.
    pub(super) async fn put_record_beside<T: Record + PartialEq>(
        &self,
        name: &Name,
        kind: Kind,
        body: Body,
        record: &T,
    ) -> Result<Created, CatalogError> {
        let ours = own_name(name, &header_of(&body));
        if self.same_record_beside(name, &ours, kind, record).await? {
            return Ok(Created::AlreadyThere);
        }
        match self.put_bytes(&ours, body).await {
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => return Err(self.taken(&ours)),
            created => created?,
        };
        match self.same_record_beside(name, &ours, kind, record).await {
            Ok(true) => Ok(Created::AlreadyThere),
            Ok(false) => Ok(Created::New),
            Err(error) => {
                if matches!(error, CatalogError::Taken { .. }) {
                    self.withdraw(&ours).await?;
                }
                Err(error)
            }
        }
    }

    /// Whether the same record is there under another name; [`CatalogError::Taken`] where another record is.
    async fn same_record_beside<T: Record + PartialEq>(
        &self,
        name: &Name,
        ours: &Name,
        kind: Kind,
        record: &T,
    ) -> Result<bool, CatalogError> {
        let mut same = None;
        for (other, _) in self.names_of(&name.object).await? {
            if other == *ours {
                continue;
            }
            let theirs = match self.get_one(&other, kind).await {
                Ok(opened) => {
                    records::from_json::<T>(&opened.plaintext).map_err(|source| self.record(&opened.name, source))
                }
                Err(error) => Err(error),
            };
            match theirs {
                Ok(theirs) if theirs == *record => same = same.or(Some(other)),
                Ok(_) => return Err(self.taken(&other)),
                // A record of another kind: a tombstone in a manifest's place.
                Err(CatalogError::Record { source: records::RecordError::Other { .. }, .. }) => {
                    return Err(self.taken(&other));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => {
                    tracing::error!(object = %other, %error, "does not open; what is put now stands beside it");
                }
                Err(error) => return Err(error),
            }
        }
        let Some(same) = same else { return Ok(false) };
        match self.sync_object(&same).await {
            Err(error) if error.is_not_found() => Ok(false),
            synced => synced.map(|()| true),
        }
    }

    // ---- reading

    /// The content of an object that may lie under several names, which all have to hold the same.
    ///
    /// # Errors
    /// [`CatalogError::TwoContents`]; "not found" where no name is there; the damage, where none opens.
    pub(super) async fn get_shared(&self, name: &Name, kind: Kind) -> Result<Opened, CatalogError> {
        let names = self.names_of(&name.object).await?.into_iter().map(|(name, _)| name);
        match self.first_that_agrees(names.collect(), kind).await? {
            Some(opened) => Ok(opened),
            None => Err(self.in_store(StoreError::NotFound { key: self.key_of(name)? })),
        }
    }

    /// The first of these names that opens; `None` where none is there.
    ///
    /// # Errors
    /// [`CatalogError::TwoContents`] where another opens, too, and holds something else; the damage, where none opens.
    pub(super) async fn first_that_agrees(&self, names: Vec<Name>, kind: Kind) -> Result<Option<Opened>, CatalogError> {
        let (mut found, mut damage): (Option<(Opened, Mark)>, _) = (None, None);
        for name in names {
            let read = match &found {
                None => self.get_one(&name, kind).await.and_then(|opened| {
                    let mark = self.mark_in(&name, kind, &opened.note, &opened.plaintext)?;
                    found = Some((opened, mark));
                    Ok(())
                }),
                Some((first, mark)) => match self.mark_of(&name, kind).await {
                    Ok(other) if other == *mark => Ok(()),
                    Ok(_) => return Err(self.two_contents(&first.name, &name)),
                    Err(error) => Err(error),
                },
            };
            match read {
                Ok(()) => {}
                Err(error) if error.is_not_found() => {} // withdrawn in this moment
                Err(error) if error.is_damage() => damage = damage.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match (found, damage) {
            (Some((opened, _)), _) => Ok(Some(opened)),
            (None, Some(damage)) => Err(damage),
            (None, None) => Ok(None),
        }
    }

    fn mark_in(&self, name: &Name, kind: Kind, note: &[u8], plaintext: &[u8]) -> Result<Mark, CatalogError> {
        match kind {
            Kind::WalRange | Kind::History | Kind::WalFile => Ok(Mark::Note(self.identity_in(name, kind, note)?.0)),
            _ => Ok(Mark::Plaintext(Digest::of(plaintext))),
        }
    }

    async fn mark_of(&self, name: &Name, kind: Kind) -> Result<Mark, CatalogError> {
        match kind {
            Kind::WalRange | Kind::History | Kind::WalFile => Ok(Mark::Note(self.identity_of(name, kind).await?.0)),
            _ => Ok(Mark::Plaintext(Digest::of(&self.get_one(name, kind).await?.plaintext))),
        }
    }

    pub(super) fn two_contents(&self, name: &Name, other: &Name) -> CatalogError {
        let (repository, name, other) = (self.name().to_owned(), name.to_string(), other.to_string());
        CatalogError::TwoContents { repository, name, other }
    }

    /// Whether those copies of one piece of WAL that open hold the same, by their notes. Tails are pieces of their own.
    ///
    /// # Errors
    /// [`CatalogError::TwoContents`]; what the store says.
    pub(super) async fn agree(&self, copies: &[Piece]) -> Result<(), CatalogError> {
        if copies.len() < 2 || copies.iter().any(Piece::is_tail) {
            return Ok(());
        }
        let mut first = None;
        for piece in copies {
            let digests = match self.note_of(piece).await {
                Ok(note) => (note.digest_from, note.digest_to),
                Err(error) if error.is_damage() || error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            match &first {
                None => first = Some((&piece.name, digests)),
                Some((_, known)) if *known == digests => {}
                Some((other, _)) => return Err(self.two_contents(other, &piece.name)),
            }
        }
        Ok(())
    }
}

pub(super) fn json_of(at: &impl std::fmt::Display, format: &RepositoryFormat) -> Result<Body, StoreError> {
    let json = serde_json::to_vec_pretty(format).map_err(|error| unsuitable(at, error))?;
    Ok(json.into())
}

fn unsuitable(at: &impl std::fmt::Display, error: impl std::fmt::Display) -> StoreError {
    StoreError::Unsupported { op: Op::Put, at: at.to_string(), reason: error.to_string() }
}

/// Creates the file that says what a repository is; `false` where somebody else does it in this moment.
pub(super) async fn create_format(
    store: &dyn Store,
    name: &Name,
    token: Id128,
    format: &RepositoryFormat,
) -> Result<bool, StoreError> {
    let ours = Key::new(name.copy(CopyToken::of(token)).to_string()).map_err(|error| unsuitable(name, error))?;
    store.put_new(&ours, json_of(name, format)?).await?;
    let listed = pages(store, ListRequest::flat(name.to_string())).await?;
    let alone = listed.objects.iter().all(|object| object.key == ours);
    if !alone {
        store.delete(&ours).await?;
    }
    Ok(alone)
}
