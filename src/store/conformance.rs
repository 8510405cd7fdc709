//! The promises of [`Store`] and [`Tail`], one check each. Every store and every decorator passes all of them.
//!
//! **For tests**; compiled always, so that those under `tests/` can run it against stores that need a server. A broken
//! promise is an error that says which one it was, not a panic.

use std::sync::Arc;

use bytes::Bytes;

use super::{Body, Created, Key, ListRequest, Listing, Store, StoreError, list_all, list_folders, pages};

/// A promise that was not kept.
#[derive(Debug, thiserror::Error)]
#[error("promise {promise}: {detail}")]
pub struct Broken {
    /// The name of the check.
    pub promise: &'static str,
    /// What was expected and seen.
    pub detail: String,
}

/// What the store under test cannot help.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expect {
    /// Answers get lost on the way: a put that created the object may say that it was there already.
    pub answers_get_lost: bool,
}

/// Fails the check with its words unless the condition holds.
macro_rules! promised {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+));
        }
    };
}

/// The same for an outcome of a certain shape.
macro_rules! promised_shape {
    ($outcome:expr, $shape:pat $(if $guard:expr)?, $($words:tt)+) => {{
        let outcome = $outcome;
        promised!(matches!(&outcome, $shape $(if $guard)?), "{}: {outcome:?}", format!($($words)+));
    }};
}

type Check = Result<(), String>;

/// Runs every check, each on a fresh store from `make`.
pub async fn run<F>(make: F) -> Result<(), Broken>
where
    F: AsyncFn() -> Result<Arc<dyn Store>, StoreError>,
{
    run_with(make, Expect::default()).await
}

/// [`run`] for a store that may be excused from something.
pub async fn run_with<F>(make: F, expect: Expect) -> Result<(), Broken>
where
    F: AsyncFn() -> Result<Arc<dyn Store>, StoreError>,
{
    macro_rules! checks {
        ($($check:ident),+ $(,)?) => {$(
            let promise = stringify!($check);
            let store = make().await.map_err(|error| Broken { promise, detail: format!("no store: {error}") })?;
            Box::pin($check(store, expect)).await.map_err(|detail| Broken { promise, detail })?;
        )+};
    }
    checks!(
        what_was_put_can_be_read,
        other_bytes_are_a_conflict_and_change_nothing,
        the_same_bytes_again_are_success,
        one_of_sixteen_writers_wins,
        sixteen_writers_of_the_same_bytes_all_succeed,
        large_bodies_in_many_chunks,
        more_than_an_object_may_have_is_refused,
        ranges_are_cut_at_the_end,
        what_is_not_there_is_not_found,
        a_key_is_no_folder_of_another,
        what_is_there_can_be_synced,
        deleting_again_is_success,
        a_deleted_key_may_be_put_again,
        objects_have_length_and_age,
        listings_are_sorted_by_bytes,
        prefixes_need_not_end_at_a_folder,
        delimited_listings_fold,
        pages_join_without_gap_or_repetition,
        strange_prefixes_show_nothing,
        empty_folders_do_not_show,
        tails_grow_and_can_be_read_meanwhile,
        tails_are_never_opened_twice,
        tails_may_outgrow_their_capacity,
        tails_end_when_dropped,
        stores_without_tails_say_so,
    );
    Ok(())
}

fn key(text: &str) -> Result<Key, String> {
    Key::new(text).map_err(|error| error.to_string())
}

fn body(text: &str) -> Body {
    Body::from(text.as_bytes().to_vec())
}

fn words(error: StoreError) -> String {
    format!("failed: {error}")
}

async fn put(store: &dyn Store, name: &str, content: &str) -> Result<Created, String> {
    store.put_new(&key(name)?, body(content)).await.map_err(words)
}

async fn get(store: &dyn Store, name: &str) -> Result<Bytes, String> {
    store.get(&key(name)?, None).await.map_err(words)
}

async fn what_was_put_can_be_read(store: Arc<dyn Store>, expect: Expect) -> Check {
    for (name, content) in [("a", "some bytes"), ("deep/down/in/folders/a~1", "others"), ("empty", "")] {
        let created = put(&*store, name, content).await?;
        promised!(created == Created::New || expect.answers_get_lost, "{name} is new, but the answer was {created:?}");
        let there = get(&*store, name).await?;
        promised!(there == content, "{name} holds {there:?}, not {content:?}");
    }
    promised!(!store.describe().is_empty(), "a store has a name for messages");
    Ok(())
}

async fn other_bytes_are_a_conflict_and_change_nothing(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/a", "first").await?;
    for other in ["FIRST", "", "firs", "first and more"] {
        promised_shape!(
            store.put_new(&key("f/a")?, body(other)).await,
            Err(StoreError::Conflict { key }) if key.as_str() == "f/a",
            "{other:?} over \"first\" is a conflict"
        );
    }
    let there = get(&*store, "f/a").await?;
    promised!(there == "first", "a conflict changed the object to {there:?}");
    Ok(())
}

async fn the_same_bytes_again_are_success(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "a", "same bytes").await?;
    // Cut into chunks differently: bytes are compared, not bodies.
    let chunks: Vec<Bytes> = ["same", "", " by", "tes"].map(Bytes::from_static_str).into();
    promised_shape!(store.put_new(&key("a")?, chunks.into()).await, Ok(Created::AlreadyThere), "again is success");
    put(&*store, "empty", "").await?;
    promised_shape!(store.put_new(&key("empty")?, Body::default()).await, Ok(Created::AlreadyThere), "empty too");
    Ok(())
}

/// `Bytes::from_static` for text.
trait FromStaticStr {
    fn from_static_str(text: &'static str) -> Bytes;
}

impl FromStaticStr for Bytes {
    fn from_static_str(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }
}

async fn one_of_sixteen_writers_wins(store: Arc<dyn Store>, _: Expect) -> Check {
    for round in 0..8 {
        let key = key(&format!("race/{round}/a"))?;
        let results = race(&store, &key, |writer| format!("writer {writer} ").repeat(5000)).await?;
        if !store.creates_exclusively() {
            // Several may believe that they created it. What is there is one of them's, whole, and nobody's failure is called success.
            let there = store.get(&key, None).await.map_err(words)?;
            let whose = (0..16).find(|writer| there == format!("writer {writer} ").repeat(5000));
            let Some(winner) = whose else { return Err(format!("one writer's bytes are there, whole: {results:?}")) };
            promised_shape!(results.get(winner), Some(Ok(_)), "writer {winner}, whose bytes are there, is told so");
            continue;
        }
        let mut winners = results.iter().enumerate().filter(|(_, result)| result.is_ok());
        let (Some((winner, _)), None) = (winners.next(), winners.next()) else {
            return Err(format!("exactly one writer wins: {results:?}"));
        };
        let losers = results.iter().filter(|result| matches!(result, Err(StoreError::Conflict { .. }))).count();
        promised!(losers == 15, "all others are told of the conflict: {results:?}");
        let there = store.get(&key, None).await.map_err(words)?;
        promised!(there == format!("writer {winner} ").repeat(5000), "the winner's bytes are there, whole");
    }
    Ok(())
}

async fn sixteen_writers_of_the_same_bytes_all_succeed(store: Arc<dyn Store>, expect: Expect) -> Check {
    let key = key("race/same")?;
    let results = race(&store, &key, |_| "the same".repeat(5000)).await?;
    promised!(results.iter().all(Result::is_ok), "the same bytes are no conflict: {results:?}");
    let new = results.iter().filter(|result| matches!(result, Ok(Created::New))).count();
    let many = new > 1 && !store.creates_exclusively();
    promised!(new == 1 || many || (new == 0 && expect.answers_get_lost), "one of them created it: {results:?}");
    Ok(())
}

async fn race(
    store: &Arc<dyn Store>,
    key: &Key,
    content: impl Fn(usize) -> String,
) -> Result<Vec<Result<Created, StoreError>>, String> {
    let start = Arc::new(tokio::sync::Barrier::new(16));
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let (store, key, body, start) = (store.clone(), key.clone(), body(&content(writer)), start.clone());
            tokio::spawn(async move {
                start.wait().await;
                store.put_new(&key, body).await
            })
        })
        .collect();
    let mut results = Vec::new();
    for writer in writers {
        results.push(writer.await.map_err(|error| error.to_string())?);
    }
    Ok(results)
}

async fn large_bodies_in_many_chunks(store: Arc<dyn Store>, _: Expect) -> Check {
    let chunk = |n: usize, len: usize| Bytes::from((0..len).map(|i| (i * 31 + n) as u8).collect::<Vec<u8>>());
    // More than 1024 chunks, which is as many as one writev takes; and 20 MB in large ones.
    for (name, count, len) in [("small", 3000, 17), ("large", 20, 1 << 20)] {
        let body = Body::from((0..count).map(|n| chunk(n, len)).collect::<Vec<_>>());
        let whole = body.to_bytes();
        promised!(body.len() == whole.len() as u64, "a body knows its length");
        store.put_new(&key(name)?, body.clone()).await.map_err(words)?;
        promised!(get(&*store, name).await? == whole, "{name} chunks come back as they were");
        promised_shape!(store.put_new(&key(name)?, body).await, Ok(Created::AlreadyThere), "again is success");
        let mut other = whole.to_vec();
        if let Some(last) = other.last_mut() {
            *last ^= 1;
        }
        let other = store.put_new(&key(name)?, other.into()).await;
        promised_shape!(other, Err(StoreError::Conflict { .. }), "one bit that differs at the end is a conflict");
    }
    Ok(())
}

async fn more_than_an_object_may_have_is_refused(store: Arc<dyn Store>, _: Expect) -> Check {
    let chunk = Bytes::from(vec![0; 1 << 20]);
    let body = Body::from(vec![chunk; (super::MAX_BODY >> 20) as usize + 1]);
    promised_shape!(store.put_new(&key("a")?, body).await, Err(StoreError::TooLarge { .. }), "too large is refused");
    promised!(list_all(&*store, "").await.map_err(words)?.is_empty(), "nothing was written");
    Ok(())
}

async fn ranges_are_cut_at_the_end(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "a", "0123456789").await?;
    let cases = [
        (0..10, "0123456789"),
        (0..0, ""),
        (2..5, "234"),
        (9..10, "9"),
        (5..100, "56789"),
        (0..u64::MAX, "0123456789"),
        (10..20, ""),
        (11..20, ""),
        (u64::MAX - 1..u64::MAX, ""),
    ];
    for (range, want) in cases {
        let there = store.get(&key("a")?, Some(range.clone())).await.map_err(words)?;
        promised!(there == want, "{range:?} of 0123456789 is {want:?}, not {there:?}");
    }
    put(&*store, "empty", "").await?;
    let there = store.get(&key("empty")?, Some(0..5)).await.map_err(words)?;
    promised!(there.is_empty(), "a range of an empty object is empty");
    Ok(())
}

async fn what_is_not_there_is_not_found(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/a", "x").await?;
    // Beside it, in a folder that is missing, the folder itself, below an object.
    for name in ["f/b", "g/a", "f", "f/a/b", "F/a"] {
        let key = key(name)?;
        promised_shape!(store.get(&key, None).await, Err(StoreError::NotFound { key: said }) if *said == key, "get {name}");
        promised_shape!(store.get(&key, Some(0..1)).await, Err(StoreError::NotFound { .. }), "range of {name}");
        promised_shape!(store.head(&key).await, Err(StoreError::NotFound { .. }), "head {name}");
    }
    Ok(())
}

async fn a_key_is_no_folder_of_another(store: Arc<dyn Store>, _: Expect) -> Check {
    // Object stores hold both. What no store does is lose or change what was there.
    put(&*store, "f/a", "x").await?;
    for name in ["f", "f/a/b"] {
        promised_shape!(
            store.put_new(&key(name)?, body("y")).await,
            Ok(_) | Err(StoreError::Conflict { .. }),
            "{name} beside f/a is taken or refused"
        );
    }
    promised!(get(&*store, "f/a").await? == "x", "f/a is as it was");
    Ok(())
}

async fn what_is_there_can_be_synced(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/g/a", "some bytes").await?;
    for _ in 0..2 {
        store.sync(&key("f/g/a")?).await.map_err(words)?;
    }
    promised!(get(&*store, "f/g/a").await? == "some bytes", "and is as it was");
    for absent in ["f/g/b", "f/h/a", "f/g", "f/g/a/b"] {
        let synced = store.sync(&key(absent)?).await;
        promised_shape!(synced, Err(StoreError::NotFound { .. }), "{absent:?} is not there");
    }
    store.delete(&key("f/g/a")?).await.map_err(words)?;
    promised_shape!(store.sync(&key("f/g/a")?).await, Err(StoreError::NotFound { .. }), "nor what was deleted");
    if store.appends() {
        let mut tail = store.open_tail(&key("open/t")?, 100).await.map_err(words)?;
        tail.append(body("x")).await.map_err(words)?;
        store.sync(&key("open/t")?).await.map_err(words)?;
    }
    Ok(())
}

async fn deleting_again_is_success(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/a", "x").await?;
    put(&*store, "f/b", "y").await?;
    for _ in 0..2 {
        store.delete(&key("f/a")?).await.map_err(words)?;
        promised_shape!(store.head(&key("f/a")?).await, Err(StoreError::NotFound { .. }), "deleted");
    }
    for name in ["never/was", "f", "f/b/c"] {
        store.delete(&key(name)?).await.map_err(words)?;
    }
    promised!(get(&*store, "f/b").await? == "y", "others stay");
    Ok(())
}

async fn a_deleted_key_may_be_put_again(store: Arc<dyn Store>, _: Expect) -> Check {
    for content in ["one", "two", "three"] {
        put(&*store, "f/g/a", content).await?;
        promised!(get(&*store, "f/g/a").await? == content, "the new bytes are there");
        store.delete(&key("f/g/a")?).await.map_err(words)?;
    }
    Ok(())
}

async fn objects_have_length_and_age(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/a", "0123456789").await?;
    put(&*store, "f/b", "").await?;
    let a = store.head(&key("f/a")?).await.map_err(words)?;
    promised!((a.key.as_str(), a.len) == ("f/a", 10), "head says name and length: {a:?}");
    let listed = list_all(&*store, "f/").await.map_err(words)?;
    promised!(listed.first() == Some(&a), "a listing says the same as head: {listed:?}");
    promised!(
        listed.get(1).is_some_and(|b| b.len == 0 && b.modified >= a.modified),
        "ages follow the order: {listed:?}"
    );
    Ok(())
}

/// Names in the order of their bytes, with those that a walk through directories gets wrong easily: `-` and `.` sort
/// before the `/` of a folder, digits and letters after.
const SORTED: [&str; 12] = ["A", "a-b", "a.b/c", "a.c", "a/b", "a/b-c", "a/c/d", "a/c/e", "a0", "a_", "b/c/d/e", "~"];

async fn put_sorted(store: &dyn Store) -> Check {
    for name in SORTED.iter().rev() {
        put(store, name, name).await?;
    }
    Ok(())
}

fn names(listing: &Listing) -> Vec<&str> {
    listing.objects.iter().map(|object| object.key.as_str()).collect()
}

async fn listings_are_sorted_by_bytes(store: Arc<dyn Store>, _: Expect) -> Check {
    promised!(list_all(&*store, "").await.map_err(words)?.is_empty(), "a new store is empty");
    put_sorted(&*store).await?;
    let all = pages(&*store, ListRequest::flat("")).await.map_err(words)?;
    promised!(names(&all) == SORTED, "all keys in order: {all:?}");
    promised!(all.folders.is_empty(), "a flat listing has no folders: {all:?}");
    Ok(())
}

async fn prefixes_need_not_end_at_a_folder(store: Arc<dyn Store>, _: Expect) -> Check {
    put_sorted(&*store).await?;
    for prefix in ["a", "a/", "a/c", "a/c/", "a/c/e", "a.", "b/c", "x", "a/c/d/", "A/", "a/b-", "~"] {
        let all = pages(&*store, ListRequest::flat(prefix)).await.map_err(words)?;
        let want: Vec<&str> = SORTED.into_iter().filter(|name| name.starts_with(prefix)).collect();
        promised!(names(&all) == want, "under {prefix:?} lie {want:?}, not {all:?}");
    }
    Ok(())
}

async fn delimited_listings_fold(store: Arc<dyn Store>, _: Expect) -> Check {
    put_sorted(&*store).await?;
    let cases: [(&str, &[&str], &[&str]); 7] = [
        ("", &["A", "a-b", "a.c", "a0", "a_", "~"], &["a.b/", "a/", "b/"]),
        ("a", &["a-b", "a.c", "a0", "a_"], &["a.b/", "a/"]),
        ("a/", &["a/b", "a/b-c"], &["a/c/"]),
        ("a/c", &[], &["a/c/"]),
        ("b/", &[], &["b/c/"]),
        ("b/c/d/e", &["b/c/d/e"], &[]),
        ("b/c/d/e/", &[], &[]),
    ];
    for (prefix, objects, folders) in cases {
        let all = pages(&*store, ListRequest::delimited(prefix)).await.map_err(words)?;
        promised!(
            names(&all) == objects && all.folders == folders,
            "{prefix:?} shows {objects:?} and {folders:?}: {all:?}"
        );
    }
    let folders = list_folders(&*store, "a/").await.map_err(words)?;
    promised!(folders == ["a/c/"], "folders right under a/: {folders:?}");
    Ok(())
}

async fn pages_join_without_gap_or_repetition(store: Arc<dyn Store>, _: Expect) -> Check {
    put_sorted(&*store).await?;
    for delimited in [false, true] {
        for prefix in ["", "a", "a/", "a/c"] {
            let whole = ListRequest { delimited, ..ListRequest::flat(prefix) };
            let want = pages(&*store, whole.clone()).await.map_err(words)?;
            for limit in [1, 2, 3, 5, 12] {
                let mut request = ListRequest { limit, ..whole.clone() };
                let mut got = Listing::default();
                for _ in 0..=2 * SORTED.len() {
                    let page = store.list(&request).await.map_err(words)?;
                    promised!(page.objects.len() + page.folders.len() <= limit, "at most {limit} names: {page:?}");
                    got.objects.extend(page.objects);
                    got.folders.extend(page.folders);
                    request.after = page.next;
                    if request.after.is_none() {
                        break;
                    }
                }
                promised!(request.after.is_none(), "pages of {limit} under {prefix:?} come to an end");
                promised!(
                    got == want,
                    "pages of {limit} under {prefix:?} (delimited: {delimited}): {got:?}, not {want:?}"
                );
            }
        }
    }
    for after in ["", "a", "a/", "a/b", "a/c/d", "a/c0", "zz", "a.b/"] {
        let request = ListRequest { after: Some(after.into()), ..ListRequest::flat("a") };
        let page = store.list(&request).await.map_err(words)?;
        let want: Vec<&str> = SORTED.into_iter().filter(|name| name.starts_with('a') && *name > after).collect();
        promised!(names(&page) == want, "after {after:?} come {want:?}: {page:?}");
    }
    let none = ListRequest { limit: 0, ..ListRequest::flat("") };
    let page = store.list(&none).await.map_err(words)?;
    promised!(page.objects.len() == 1 && page.next.is_some(), "a limit of 0 is a limit of 1: {page:?}");
    Ok(())
}

async fn strange_prefixes_show_nothing(store: Arc<dyn Store>, _: Expect) -> Check {
    put_sorted(&*store).await?;
    for prefix in ["/", "/a", "..", "../", "../../etc/", "a/../", "a//", "./", "a/./", "\0", "ä", ".pgkeep-tmp/", "."]
    {
        for request in [ListRequest::flat(prefix), ListRequest::delimited(prefix)] {
            promised_shape!(store.list(&request).await, Ok(listing) if *listing == Listing::default(), "prefix {prefix:?}");
        }
    }
    Ok(())
}

async fn empty_folders_do_not_show(store: Arc<dyn Store>, _: Expect) -> Check {
    put(&*store, "f/g/h/a", "x").await?;
    put(&*store, "f/b", "x").await?;
    store.delete(&key("f/g/h/a")?).await.map_err(words)?;
    let folders = list_folders(&*store, "f/").await.map_err(words)?;
    promised!(folders.is_empty(), "the folder of what was deleted is gone: {folders:?}");
    store.delete(&key("f/b")?).await.map_err(words)?;
    let folders = list_folders(&*store, "").await.map_err(words)?;
    promised!(folders.is_empty(), "and the one above: {folders:?}");
    Ok(())
}

async fn tails_grow_and_can_be_read_meanwhile(store: Arc<dyn Store>, _: Expect) -> Check {
    if !store.appends() {
        return Ok(());
    }
    let name = key("open/00000001/0000000000000001.00000000-")?;
    let mut tail = store.open_tail(&name, 1 << 20).await.map_err(words)?;
    promised!(tail.is_empty(), "a tail begins empty");
    let there = store.get(&name, None).await.map_err(words)?;
    promised!(there.iter().all(|byte| *byte == 0), "nothing but zeros before the first append");
    let mut want = Vec::new();
    for n in 0..20_u8 {
        let chunks: Vec<Bytes> = vec![vec![n + 1; 100 * usize::from(n)].into(), Bytes::new(), vec![0xFF].into()];
        chunks.iter().for_each(|chunk| want.extend_from_slice(chunk));
        tail.append(chunks.into()).await.map_err(words)?;
        promised!(tail.len() == want.len() as u64, "a tail knows its length: {} for {}", tail.len(), want.len());
        let there = store.get(&name, None).await.map_err(words)?;
        promised!(there.starts_with(&want), "what was appended can be read");
        promised!(there.iter().skip(want.len()).all(|byte| *byte == 0), "nothing but zeros beyond");
        let end = store.get(&name, Some(want.len() as u64 - 1..want.len() as u64)).await.map_err(words)?;
        promised!(end[..] == [0xFF], "by range too");
    }
    let meta = store.head(&name).await.map_err(words)?;
    promised!(meta.len >= want.len() as u64, "head shows what was appended: {meta:?}");
    let listed = list_all(&*store, "open/").await.map_err(words)?;
    promised!(listed.iter().any(|object| object.key == name), "a tail is listed: {listed:?}");
    tail.append(Body::default()).await.map_err(words)?;
    promised!(tail.len() == want.len() as u64, "appending nothing changes nothing");
    store.delete(&name).await.map_err(words)?;
    promised!(tail.append(body("x")).await.is_err(), "what is appended to a deleted tail is not durable");
    promised_shape!(tail.append(body("x")).await, Err(StoreError::TailClosed { .. }), "a tail that failed is closed");
    promised_shape!(store.head(&name).await, Err(StoreError::NotFound { .. }), "and it does not come back");
    Ok(())
}

async fn tails_are_never_opened_twice(store: Arc<dyn Store>, _: Expect) -> Check {
    if !store.appends() {
        return Ok(());
    }
    let name = key("open/t")?;
    let mut tail = store.open_tail(&name, 100).await.map_err(words)?;
    promised_shape!(store.open_tail(&name, 100).await, Err(StoreError::Conflict { .. }), "an open tail is not opened");
    tail.append(body("first")).await.map_err(words)?;
    promised_shape!(store.put_new(&name, body("x")).await, Err(StoreError::Conflict { .. }), "nor overwritten");
    drop(tail);
    promised_shape!(store.open_tail(&name, 100).await, Err(StoreError::Conflict { .. }), "nor after it has ended");
    put(&*store, "object", "x").await?;
    promised_shape!(store.open_tail(&key("object")?, 9).await, Err(StoreError::Conflict { .. }), "nor is an object");
    promised!(get(&*store, "object").await? == "x", "which is as it was");
    promised!(get(&*store, "open/t").await?.starts_with(b"first"), "as is the tail");
    Ok(())
}

async fn tails_may_outgrow_their_capacity(store: Arc<dyn Store>, _: Expect) -> Check {
    if !store.appends() {
        return Ok(());
    }
    for (name, capacity) in [("t0", 0), ("t1", 1), ("t10000", 10_000)] {
        let mut tail = store.open_tail(&key(name)?, capacity).await.map_err(words)?;
        for _ in 0..3 {
            tail.append(vec![7; 9000].into()).await.map_err(words)?;
        }
        let there = get(&*store, name).await?;
        promised!(there.starts_with(&[7; 27_000]), "{name} holds what went beyond its capacity");
    }
    Ok(())
}

async fn tails_end_when_dropped(store: Arc<dyn Store>, _: Expect) -> Check {
    if !store.appends() {
        return Ok(());
    }
    let mut tail = store.open_tail(&key("t")?, 1 << 20).await.map_err(words)?;
    tail.append(body("all there is")).await.map_err(words)?;
    drop(tail);
    promised!(get(&*store, "t").await?.starts_with(b"all there is"), "a dropped tail keeps what was appended");
    Ok(())
}

async fn stores_without_tails_say_so(store: Arc<dyn Store>, _: Expect) -> Check {
    if store.appends() {
        return Ok(());
    }
    promised_shape!(store.open_tail(&key("t")?, 9).await, Err(StoreError::Unsupported { .. }), "no tails, in words");
    promised_shape!(store.head(&key("t")?).await, Err(StoreError::NotFound { .. }), "and nothing is created");
    Ok(())
}
