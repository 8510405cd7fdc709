//! What was found out about the store that a repository lies in, remembered in it.
//!
//! Plain JSON without secrets, because it is read before anything else: it says how puts behave. The newest counts, by
//! its name. One that is not understood counts as none, and without one nothing is taken for granted.

use super::layout::{Name, Object, Second, folder};
use crate::store::s3::Verdict;
use crate::store::{Key, ListRequest, Op, Store, StoreError, pages};

/// How often a name is tried that somebody else takes in the same moment.
const TRIES: usize = 4;
/// It has some hundred bytes.
const MAX_LEN: u64 = 64 << 10;

/// The newest verdict; `None` where there is none that is understood. Costs a listing, and a read where there is one.
///
/// # Errors
/// What the store says.
pub async fn remembered(store: &dyn Store) -> Result<Option<Verdict>, StoreError> {
    let Some((_, key)) = newest(store).await? else { return Ok(None) };
    let json = store.get(&key, Some(0..MAX_LEN)).await?;
    match serde_json::from_slice(&json) {
        Ok(verdict) => Ok(Some(verdict)),
        Err(error) => {
            tracing::warn!(%key, %error, "what was found out about the store is not understood; run `pgkeep check`");
            Ok(None)
        }
    }
}

/// Writes down what was found out, under a name that is newer than all that are there, whatever clock they were made by.
///
/// # Errors
/// What the store says.
pub async fn remember(store: &dyn Store, verdict: &Verdict) -> Result<(), StoreError> {
    let mut second = Second::of(verdict.probed_at);
    let mut tried = 0;
    loop {
        second = newest(store).await?.map_or(second, |(newest, _)| second.max(newest.next()));
        let name = Name::new(Object::StoreVerdict(second));
        let unsuitable = |reason: String| StoreError::Unsupported { op: Op::Put, at: name.to_string(), reason };
        let json = serde_json::to_vec_pretty(verdict).map_err(|error| unsuitable(error.to_string()))?;
        let key = Key::new(name.to_string()).map_err(|error| unsuitable(error.to_string()))?;
        match store.put_new(&key, json.into()).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Conflict { .. }) if tried < TRIES => tried += 1, // somebody else's, of this moment
            Err(error) => return Err(error),
        }
    }
}

async fn newest(store: &dyn Store) -> Result<Option<(Second, Key)>, StoreError> {
    let listed = pages(store, ListRequest::flat(folder::store_verdicts())).await?;
    let verdicts = listed.objects.into_iter().filter_map(|object| match Name::parse(object.key.as_str()) {
        Ok(Name { object: Object::StoreVerdict(second), copy: None }) => Some((second, object.key)),
        _ => None,
    });
    Ok(verdicts.max())
}

/// Whether two verdicts say the same, whenever they were found.
pub fn agree(one: &Verdict, other: &Verdict) -> bool {
    let then = Verdict { probed_at: other.probed_at, ..one.clone() };
    then == *other
}
