//! Reading: objects whole and by range, what is known of them, and listings.

use std::ops::Range;

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::DateTime;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

use super::super::key::is_part;
use super::super::{Body, Key, ListRequest, Listing, MAX_READ, ObjectMeta, Op, StoreError};
use super::S3Store;
use super::body::Comparison;
use super::errors::Failed;

/// No object is longer; ranges that start beyond it are not sent, since servers differ in how they take them.
const BEYOND: u64 = 1 << 50;
/// Most names that a server puts on a page.
const SERVER_PAGE: usize = 1000;
/// Most space that is set aside at once because a server announces so many bytes.
const AT_ONCE: u64 = 64 << 20;
/// Pages of a listing that hold nothing of ours, before it is given up.
const EMPTY_PAGES: usize = 1000;
/// Sorts behind everything that can follow a `/` in a key.
const BEHIND: char = '\u{FFFD}';

/// What a HEAD said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked {
    pub(super) len: u64,
    pub(super) modified: Timestamp,
}

impl S3Store {
    /// What is under `key`; `None` for every 404, so for a bucket that is not there too.
    pub(super) async fn look(&self, key: &str) -> Result<Option<Looked>, Failed> {
        let request = self.client().head_object().bucket(&self.options().bucket).key(self.full(key));
        match self.ask(0, request.send()).await {
            Ok(found) => {
                let len = found.content_length.and_then(|len| u64::try_from(len).ok());
                match (len, timestamp(found.last_modified)) {
                    (Some(len), Some(modified)) => Ok(Some(Looked { len, modified })),
                    _ => Err(Failed::broken("the answer lacks the object's length or time")),
                }
            }
            Err(failed) if failed.status() == 404 => Ok(None),
            // The answer to a HEAD has no words; the one to a GET says what is the matter.
            Err(failed) if failed.status() != 0 && !failed.is_transient() => {
                Err(match self.ask_for_a_byte(key).await {
                    Err(in_words) if in_words.status() == failed.status() => in_words,
                    Ok(()) | Err(_) => failed,
                })
            }
            Err(failed) => Err(failed),
        }
    }

    /// A GET of as little as possible.
    async fn ask_for_a_byte(&self, key: &str) -> Result<(), Failed> {
        let request = self.client().get_object().bucket(&self.options().bucket).key(self.full(key)).range("bytes=0-0");
        self.ask(0, request.send()).await.map(drop)
    }

    /// What is under `key`, where the answer to a HEAD, which has no words, is not enough to say that nothing is.
    pub(super) async fn look_well(&self, op: Op, key: &Key) -> Result<ObjectMeta, StoreError> {
        let failed = |failed| self.failed(op, key.as_str(), failed);
        if let Some(Looked { len, modified }) = self.look(key.as_str()).await.map_err(failed)? {
            return Ok(ObjectMeta { key: key.clone(), len, modified });
        }
        match self.ask_for_a_byte(key.as_str()).await {
            Err(refused) if refused.is_no_key() => Err(StoreError::NotFound { key: key.clone() }),
            Err(refused) if refused.status() != 416 => Err(failed(refused)),
            // It came in between.
            Ok(_) | Err(_) => Err(failed(Failed::broken("the server answered differently twice"))),
        }
    }

    pub(super) async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let range = range.unwrap_or(0..u64::MAX);
        if range.start >= range.end || range.start >= BEYOND {
            return self.look_well(Op::Get, key).await.map(|_| Bytes::new());
        }
        let failed = |failed| self.failed(Op::Get, key.as_str(), failed);
        // One byte more than may be returned: what is longer shows.
        let end = range.end.min(range.start.saturating_add(MAX_READ + 1));
        let whole = range == (0..u64::MAX);
        let header = (!whole).then(|| format!("bytes={}-{}", range.start, end - 1)); // invariant: start < end
        let request = self.client().get_object().bucket(&self.options().bucket).key(self.full(key.as_str()));
        let answer = match self.ask(0, request.set_range(header).send()).await {
            Ok(answer) => answer,
            Err(refused) if refused.is_no_key() => return Err(StoreError::NotFound { key: key.clone() }),
            Err(refused) if refused.status() == 416 => return Ok(Bytes::new()),
            Err(refused) => return Err(failed(refused)),
        };
        let extent = Extent::of(&answer).map_err(failed)?;
        let wanted = range.start..range.end.min(extent.total.max(range.start));
        if wanted.end - wanted.start > MAX_READ {
            let (at, len) = (self.at(key.as_str()), wanted.end - wanted.start);
            return Err(StoreError::TooLarge { op: Op::Get, at, len, limit: MAX_READ });
        }
        if wanted.is_empty() {
            return Ok(Bytes::new());
        }
        if extent.start > wanted.start || extent.start + extent.len < wanted.end {
            let text = format!("asked for bytes {header:?}, got others", header = (range.start, range.end));
            return Err(failed(Failed::broken(text)));
        }
        let len = wanted.end - wanted.start;
        let skip = wanted.start - extent.start;
        let bytes = self.within(extent.len, collect(answer, extent.len, skip, len)).await.map_err(failed)?;
        Ok(bytes)
    }

    /// Whether `body` is what lies under `key`; `None` where nothing does. Stops at the first byte that differs.
    pub(super) async fn same(&self, key: &str, body: &Body) -> Result<Option<bool>, Failed> {
        let request = self.client().get_object().bucket(&self.options().bucket).key(self.full(key));
        let mut answer = match self.ask(0, request.send()).await {
            Ok(answer) => answer,
            Err(failed) if failed.is_no_key() => return Ok(None),
            Err(failed) => return Err(failed),
        };
        let len = Extent::of(&answer)?.len;
        if len != body.len() {
            return Ok(Some(false));
        }
        let compare = async {
            let mut comparison = Comparison::with(body.chunks());
            let mut got = 0;
            while let Some(piece) = answer.body.next().await {
                let piece = piece.map_err(|error| cut_short(got, len, &error))?;
                got += piece.len() as u64;
                if !comparison.goes_on_with(&piece) {
                    return Ok(Some(false));
                }
            }
            if got == len && comparison.ends() { Ok(Some(true)) } else { Err(cut_short(got, len, &"it just ended")) }
        };
        self.within(len, compare).await
    }

    pub(super) async fn page(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        if !can_begin_a_key(&request.prefix) {
            return Ok(listing);
        }
        let failed = |failed| self.failed(Op::List, &request.prefix, failed);
        let root = self.full("");
        let limit = request.page();
        let mut after = request.after.clone();
        for _ in 0..EMPTY_PAGES {
            // A folder as `after` means all that is in it. S3 would show it again.
            let behind = after.as_deref().map(|after| match request.delimited && after.ends_with('/') {
                true => format!("{root}{after}{BEHIND}"),
                false => format!("{root}{after}"),
            });
            let sent = self
                .client()
                .list_objects_v2()
                .bucket(&self.options().bucket)
                .prefix(self.full(&request.prefix))
                .set_start_after(behind)
                .set_delimiter(request.delimited.then(|| "/".to_owned()))
                .max_keys(limit.min(SERVER_PAGE) as i32); // invariant: at most 1000
            let page = self.ask(0, sent.send()).await.map_err(failed)?;
            // The last name that the server showed, ours or not: there the next page begins.
            let mut last: Option<String> = None;
            for object in page.contents.unwrap_or_default() {
                let name = object.key.unwrap_or_default();
                let Some(name) = name.strip_prefix(root.as_str()) else { continue };
                last = last.max(Some(name.to_owned()));
                // Somebody else's names, and folders that a console made, are none of ours.
                let Ok(key) = Key::new(name) else { continue };
                let is_new = request.after.as_deref().is_none_or(|after| name > after);
                if !is_new || !name.starts_with(&request.prefix) {
                    continue;
                }
                let len = object.size.and_then(|size| u64::try_from(size).ok());
                match (len, timestamp(object.last_modified)) {
                    (Some(len), Some(modified)) => listing.objects.push(ObjectMeta { key, len, modified }),
                    _ => return Err(failed(Failed::broken(format!("{name} is listed without its length or time")))),
                }
            }
            for folder in page.common_prefixes.unwrap_or_default() {
                let name = folder.prefix.unwrap_or_default();
                let Some(name) = name.strip_prefix(root.as_str()) else { continue };
                last = last.max(Some(name.to_owned()));
                let is_ours = name.strip_suffix('/').is_some_and(|name| Key::new(name).is_ok());
                if is_ours && request.after.as_deref().is_none_or(|after| name > after) {
                    listing.folders.push(name.to_owned());
                }
            }
            if !listing.objects.is_sorted_by(|a, b| a.key < b.key) || !listing.folders.is_sorted() {
                let reason = "the server lists names out of order, and whoever reads on after a name would miss some";
                let at = self.at(&request.prefix);
                return Err(StoreError::Unsupported { op: Op::List, at, reason: reason.into() });
            }
            if !page.is_truncated.unwrap_or(false) {
                return Ok(listing);
            }
            if last.is_none() || (after.is_some() && last <= after) {
                return Err(failed(Failed::broken("a page that is not the last one does not go on")));
            }
            after = last;
            if !listing.objects.is_empty() || !listing.folders.is_empty() {
                listing.next = after;
                return Ok(listing);
            }
        }
        let text = format!("{EMPTY_PAGES} pages of names that are not pgkeep's; is this the right prefix?");
        Err(failed(Failed::broken(text)))
    }
}

/// Which part of an object an answer brings.
struct Extent {
    start: u64,
    len: u64,
    /// Of the object.
    total: u64,
}

impl Extent {
    fn of(answer: &GetObjectOutput) -> Result<Extent, Failed> {
        let len = answer.content_length.and_then(|len| u64::try_from(len).ok());
        let Some(len) = len else { return Err(Failed::broken("the answer does not say how long it is")) };
        let Some(range) = &answer.content_range else { return Ok(Extent { start: 0, len, total: len }) };
        let numbers = || {
            let (span, total) = range.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = span.split_once('-')?;
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            let total = total.parse().ok()?;
            (first <= last && last < total && last - first + 1 == len).then_some((first, total))
        };
        match numbers() {
            Some((start, total)) => Ok(Extent { start, len, total }),
            None => Err(Failed::broken(format!("the answer of {len} bytes calls itself {range:?}"))),
        }
    }
}

/// `len` bytes after the first `skip` of a body of `whole` bytes.
async fn collect(mut answer: GetObjectOutput, whole: u64, skip: u64, len: u64) -> Result<Bytes, Failed> {
    let mut bytes = BytesMut::with_capacity(len.min(AT_ONCE) as usize);
    let mut at: u64 = 0;
    while let Some(piece) = answer.body.next().await {
        let piece = piece.map_err(|error| cut_short(at, whole, &error))?;
        let end = at + piece.len() as u64;
        let (from, to) = (skip.clamp(at, end) - at, (skip + len).clamp(at, end) - at);
        bytes.extend_from_slice(piece.get(from as usize..to as usize).unwrap_or_default());
        at = end;
    }
    // Not above `whole`: the connection sees to it.
    if at == whole { Ok(bytes.freeze()) } else { Err(cut_short(at, whole, &"it just ended")) }
}

fn cut_short(got: u64, len: u64, why: &dyn std::fmt::Display) -> Failed {
    Failed::broken(format!("the body broke off after {got} of {len} bytes: {why}"))
}

/// Whole seconds: listings have milliseconds on some servers, where HEAD has none.
fn timestamp(time: Option<DateTime>) -> Option<Timestamp> {
    Timestamp::from_second(time?.secs()).ok()
}

/// Whether any key begins with `prefix`. What does not is not sent: it would have to survive XML.
fn can_begin_a_key(prefix: &str) -> bool {
    let (folders, last) = prefix.rsplit_once('/').map_or(("", prefix), |(folders, last)| (folders, last));
    let has_folders = prefix.contains('/');
    (!has_folders || folders.split('/').all(is_part)) && (last.is_empty() || is_part(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_that_no_key_has() {
        for good in ["", "a", "a/", "a/b", "a.b/", "a/b-"] {
            assert!(can_begin_a_key(good), "{good:?}");
        }
        for bad in ["/", "/a", "..", "../", "a//", "a/../", "./", ".", "a/.", "\0", "ä", ".tmp/", "a b"] {
            assert!(!can_begin_a_key(bad), "{bad:?}");
        }
    }
}
