//! The conformance suite over the crate's own memory store, listed in pages as the services do.

use std::collections::BTreeMap;

use object_store::list::PaginatedListResult;
use object_store::memory::InMemory;

use super::*;
use crate::store::conformance;

/// Lists an [`InMemory`] as Google and Azure do: by any prefix, from an offset on, in pages with a token.
#[derive(Debug)]
struct Pages {
    inner: Arc<InMemory>,
    /// Names on a page at most: smaller than what is asked for, as services may.
    most: usize,
    /// Google leaves the offset itself out; Azure's emulator does not know offsets at all.
    knows_offsets: bool,
    /// `/` sorts before everything else, as with a hierarchical namespace.
    by_folders: bool,
}

#[async_trait]
impl PaginatedListStore for Pages {
    async fn list_paginated(
        &self,
        prefix: Option<&str>,
        options: PaginatedListOptions,
    ) -> object_store::Result<PaginatedListResult> {
        let prefix = prefix.unwrap_or_default();
        let order = |name: &str| if self.by_folders { name.replace('/', "\u{1}") } else { name.to_owned() };
        let mut names: BTreeMap<String, Option<object_store::ObjectMeta>> = BTreeMap::new();
        let mut all = self.inner.list(None);
        while let Some(meta) = all.next().await {
            let meta = meta?;
            let name = meta.location.to_string();
            let Some(rest) = name.strip_prefix(prefix) else { continue };
            let is_behind = options.offset.as_ref().is_none_or(|offset| !self.knows_offsets || name > *offset);
            if !is_behind {
                continue;
            }
            match rest.find('/').filter(|_| options.delimiter.is_some()) {
                Some(slash) => names.insert(order(&name[..prefix.len() + slash + 1]), None),
                None => names.insert(order(&name), Some(meta)),
            };
        }
        let begin = options.page_token.unwrap_or_default();
        let most = self.most.min(options.max_keys.unwrap_or(usize::MAX));
        let mut rest = names.into_iter().filter(|(name, _)| *name > begin);
        let page: Vec<_> = rest.by_ref().take(most).collect();
        let page_token = rest.next().and(page.last().map(|(name, _)| name.clone()));
        let (mut common_prefixes, mut objects) = (Vec::new(), Vec::new());
        for (name, meta) in page {
            match meta {
                Some(meta) => objects.push(meta),
                None => common_prefixes.push(Path::parse(name.replace('\u{1}', "/"))?),
            }
        }
        let result = object_store::ListResult { common_prefixes, objects, extensions: Default::default() };
        Ok(PaginatedListResult { result, page_token })
    }
}

fn store(prefix: &str, pages: impl FnOnce(Arc<InMemory>) -> Pages) -> CloudStore {
    let inner = Arc::new(InMemory::new());
    let slash = if prefix.is_empty() { "" } else { "/" };
    CloudStore {
        pages: Arc::new(pages(inner.clone())),
        objects: inner,
        prefix: format!("{prefix}{slash}"),
        place: "gs://test".into(),
    }
}

fn pages(inner: Arc<InMemory>) -> Pages {
    Pages { inner, most: 1000, knows_offsets: true, by_folders: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_of_a_store() -> Result<(), conformance::Broken> {
    conformance::run(async || Ok(Arc::new(store("", pages)) as Arc<dyn Store>)).await?;
    let cut = |inner| Pages { most: 3, ..pages(inner) };
    conformance::run(async || Ok(Arc::new(store("in/a-folder", cut)) as Arc<dyn Store>)).await?;
    let without_offsets = |inner| Pages { most: 2, knows_offsets: false, ..pages(inner) };
    conformance::run(async || Ok(Arc::new(store("x", without_offsets)) as Arc<dyn Store>)).await
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

#[tokio::test]
async fn another_order_of_names_is_refused_and_not_misread() {
    let store = store("", |inner| Pages { by_folders: true, ..pages(inner) });
    for name in ["a/b", "a-b"] {
        store.put_new(&key(name), Body::default()).await.unwrap();
    }
    // Names that show in both orders alike are fine.
    assert_eq!(store.list(&ListRequest::flat("a/")).await.unwrap().objects.len(), 1);
    let store = CloudStore { pages: Arc::new(Backwards), ..store };
    let error = store.list(&ListRequest::flat("")).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("hierarchical namespace"), "{error}");
}

/// Two pages, the second of which lies before the first.
#[derive(Debug)]
struct Backwards;

#[async_trait]
impl PaginatedListStore for Backwards {
    async fn list_paginated(
        &self,
        _: Option<&str>,
        options: PaginatedListOptions,
    ) -> object_store::Result<PaginatedListResult> {
        let name = if options.page_token.is_none() { "b" } else { "a" };
        let page_token = options.page_token.is_none().then(|| "more".to_owned());
        let common_prefixes = vec![Path::parse(name)?];
        let result = object_store::ListResult { common_prefixes, objects: vec![], extensions: Default::default() };
        Ok(PaginatedListResult { result, page_token })
    }
}

#[tokio::test]
async fn what_is_beside_our_prefix_is_not_ours() {
    let inner = Arc::new(InMemory::new());
    let at = |prefix: &str| CloudStore {
        pages: Arc::new(pages(inner.clone())),
        objects: inner.clone(),
        prefix: prefix.into(),
        place: "gs://test".into(),
    };
    let (ours, theirs) = (at("a/"), at(""));
    ours.put_new(&key("x"), b"ours"[..].into()).await.unwrap();
    theirs.put_new(&key("ab/x"), b"theirs"[..].into()).await.unwrap();
    theirs.put_new(&key("x"), b"theirs"[..].into()).await.unwrap();
    let listed = ours.list(&ListRequest::flat("")).await.unwrap();
    assert_eq!(listed.objects.len(), 1);
    assert_eq!(ours.get(&key("x"), None).await.unwrap(), "ours");
}

#[test]
fn what_opens_it_shows_nowhere() {
    let options = CloudOptions {
        bucket: "b".into(),
        prefix: "p".into(),
        endpoint: None,
        service: CloudService::Google { credentials: Some("{\"private_key\":\"s3cr3t\"}".into()) },
    };
    let error = CloudStore::open(options).unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("s3cr3t"), "{error:?}");
}

/// What stands between us and the service says 404 of everything, and the service lists the object all the same.
#[tokio::test]
async fn p7_a_bare_404_of_an_object_that_is_listed_is_no_missing_object() {
    let store = store("in/a-folder", pages);
    store.put_new(&key("a/b"), Body::default()).await.unwrap();
    store.put_new(&key("a/bc"), Body::default()).await.unwrap();
    let proxied = CloudStore { objects: Arc::new(InMemory::new()), ..store };
    for error in [proxied.get(&key("a/b"), None).await.unwrap_err(), proxied.head(&key("a/b")).await.unwrap_err()] {
        assert!(error.is_transient() && !error.is_not_found(), "{error}");
    }
    // A name that only others begin with is missing.
    for missing in ["a", "a/", "a/bcd", "b"].into_iter().filter_map(|name| Key::new(name).ok()) {
        assert!(proxied.get(&missing, None).await.unwrap_err().is_not_found(), "{missing}");
        assert!(proxied.head(&missing).await.unwrap_err().is_not_found(), "{missing}");
    }
}
