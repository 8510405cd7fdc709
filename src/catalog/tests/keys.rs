use super::*;
use crate::catalog::keys::RecipientChange;
use crate::catalog::layout::{Name, Object};
use crate::seal::Recipient;
use crate::store::fs::FsStore;

/// A further key file of the same realm, and its recipient.
fn another(world: &World) -> (KeyFile, Recipient) {
    let key = world.keys.with_new_identity();
    let recipient = key.own_recipient().unwrap();
    (key, recipient)
}

async fn opened(world: &World, key: &KeyFile) -> Repository {
    Repository::open("main", world.store.clone(), key.clone()).await.unwrap()
}

async fn reads(repo: &Repository, number: u64) -> Result<Vec<u8>, CatalogError> {
    let read = repo.read_segment(&cluster(), branch(1), segment(number), size(), None).await;
    read.map(|segment| segment.bytes.to_vec())
}

async fn add(repo: &Repository, recipient: &Recipient) {
    let change = RecipientChange::Add(recipient.clone(), Some("second".to_owned()));
    assert!(repo.change_recipients(&change).await.unwrap().1);
}

#[tokio::test]
async fn a_new_recipient_reads_what_is_there_and_what_comes() {
    for store in [Arc::new(MemoryStore::new()) as Arc<dyn Store>, {
        let dir = tempfile::tempdir().unwrap();
        Arc::new(FsStore::create(dir.keep().join("repo")).await.unwrap())
    }] {
        let world = World::over(store).await;
        let (second, recipient) = another(&world);
        put_whole(&world.repo, &wal(1), 1).await; // and its content key stays in use
        let other = opened(&world, &second).await; // the meta key is the realm's
        let error = reads(&other, 1).await.unwrap_err();
        assert!(error.to_string().contains("other recipients"), "{error}");

        add(&world.repo, &recipient).await;
        let envelopes = world.repo.open_to(&recipient).await.unwrap();
        assert_eq!((envelopes.keys, envelopes.made, envelopes.closed), (2, 2, 0), "{envelopes:?}");
        let again = world.repo.open_to(&recipient).await.unwrap();
        assert_eq!((again.made, again.there), (0, 2), "again makes nothing");
        put_whole(&world.other().await, &wal(2), 2).await;
        for number in [1, 2] {
            same(&reads(&other, number).await.unwrap(), &wal(number as u8));
        }
        assert!(!world.repo.change_recipients(&RecipientChange::Add(recipient, None)).await.unwrap().1);
        assert!(world.names().await.iter().all(|name| Name::parse(name).is_ok()), "{:?}", world.names().await);
    }
}

/// A writer that made its key before the list, and puts it after everything was opened to the new one.
#[tokio::test]
async fn a_key_that_is_under_way_is_opened_to_the_new_recipient_too() {
    let world = World::new().await;
    let (second, recipient) = another(&world);
    let writer = world.other().await;
    let range = sealed(&writer, &wal(1), branch(1), 1, (0, LEN), false).await; // its key is not durable yet
    add(&world.repo, &recipient).await;
    assert_eq!(world.repo.open_to(&recipient).await.unwrap().keys, 1, "the meta key alone is there");
    assert_eq!(writer.put_range(&range).await.unwrap(), Put::New);
    same(&reads(&opened(&world, &second).await, 1).await.unwrap(), &wal(1));
}

#[tokio::test]
async fn a_removed_recipient_keeps_what_it_could_read_and_gets_no_more() {
    let world = World::new().await;
    let (second, recipient) = another(&world);
    add(&world.repo, &recipient).await;
    let writer = world.other().await;
    put_whole(&writer, &wal(1), 1).await;
    let (list, removed) = world.repo.change_recipients(&RecipientChange::Remove(recipient.clone())).await.unwrap();
    assert!(removed && list.number == 2 && list.retired.len() == 1, "{list:?}");
    // A new run, a run of one object that would take a key of the day, and the one that removed it.
    put_whole(&world.other().await, &wal(2), 2).await;
    let usage = Usage { short_lived: true, ..Usage::new().unwrap() };
    let hook = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    put_whole(&hook, &wal(3), 3).await;
    put_whole(&world.repo, &wal(4), 4).await;
    let other = opened(&world, &second).await;
    same(&reads(&other, 1).await.unwrap(), &wal(1));
    for number in 2..=4 {
        let error = reads(&other, number).await.unwrap_err();
        assert!(error.to_string().contains("other recipients"), "{number}: {error}");
        same(&reads(&world.other().await, number).await.unwrap(), &wal(number as u8));
    }
    // Nobody is left out by removing the last one.
    let own = world.keys.own_recipient().unwrap();
    assert!(!world.repo.change_recipients(&RecipientChange::Remove(own)).await.unwrap().1);
}

/// A run that is under way takes another key when it looks at the list again, and not before.
#[tokio::test]
async fn rotation_reaches_runs_that_are_under_way() {
    let world = World::new().await;
    let seconds = Arc::new(std::sync::atomic::AtomicI64::new(1_763_600_000));
    let clock = seconds.clone();
    let now = move || Timestamp::from_second(clock.load(std::sync::atomic::Ordering::SeqCst)).unwrap();
    let usage = Usage { clock: Arc::new(now), ..Usage::new().unwrap() };
    let writer = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage.clone()).await.unwrap();
    let first = writer.writing_key().await.unwrap();
    writer.ensure_key(&first).await.unwrap();
    let person = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    let (list, _) = person.change_recipients(&RecipientChange::Rotate).await.unwrap();
    assert_eq!(list.retired, [first.key.id()]);
    assert_eq!(writer.writing_key().await.unwrap().key.id(), first.key.id());
    seconds.fetch_add(601, std::sync::atomic::Ordering::SeqCst);
    let next = writer.writing_key().await.unwrap().key.id();
    assert_ne!(next, first.key.id());
    seconds.fetch_add(601, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(writer.writing_key().await.unwrap().key.id(), next, "once");
}

/// P4: lists are authentic, and a process does not go back to an older one.
#[tokio::test]
async fn p4_lists_cannot_be_forged_moved_or_rolled_back_under_a_run() {
    let world = World::new().await;
    let (_, recipient) = another(&world);
    add(&world.repo, &recipient).await;
    let (list, _) = world.repo.change_recipients(&RecipientChange::Remove(recipient.clone())).await.unwrap();
    let name = |number| Name::new(Object::Recipients(number)).to_string();
    let (first, second) = (world.bytes(&name(1)).await, world.bytes(&name(2)).await);
    // The list before under a later number: sealed for another name. Garbage: does not open.
    for forged in [first, b"garbage".to_vec()] {
        world.store.put_new(&Key::new(name(3)).unwrap(), Body::from(forged)).await.unwrap();
        assert_eq!(world.other().await.recipients().await.unwrap().unwrap(), list);
        world.store.delete(&Key::new(name(3)).unwrap()).await.unwrap();
    }
    // Another repository of the realm takes no list of this one.
    let target: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let beside = Repository::create("second", target.clone(), &world.keys).await.unwrap();
    target.put_new(&Key::new(name(1)).unwrap(), Body::from(world.bytes(&name(1)).await)).await.unwrap();
    assert_eq!(beside.recipients().await.unwrap(), None);
    // Removed from the store: this run stays with it.
    world.store.delete(&Key::new(name(2)).unwrap()).await.unwrap();
    assert_eq!(world.repo.recipients().await.unwrap().unwrap().number, 2);
    world.store.put_new(&Key::new(name(2)).unwrap(), Body::from(second)).await.unwrap();
}

#[tokio::test]
async fn any_genuine_envelope_will_do_and_a_planted_one_is_in_nobodys_way() {
    let world = World::new().await;
    let (second, recipient) = another(&world);
    put_whole(&world.repo, &wal(1), 1).await;
    let is_content = |name: &String| name.starts_with("keys/") && !name.contains("ffffffff") && !name.contains("recip");
    let key = world.names().await.into_iter().find(is_content).unwrap();
    let realm = world.repo.realm();
    let planted = format!("{key}~{}", second.recipient_tag(realm, &recipient));
    world.store.put_new(&Key::new(planted).unwrap(), Body::from(b"planted".to_vec())).await.unwrap();
    add(&world.repo, &recipient).await;
    // It says that it is there; the reader finds none that opens. So whoever adds looks at what he finds there.
    let envelopes = world.repo.open_to(&recipient).await.unwrap();
    assert_eq!((envelopes.made, envelopes.there), (2, 0), "{envelopes:?}");
    same(&reads(&opened(&world, &second).await, 1).await.unwrap(), &wal(1));
    // The first envelope is damaged: the recipient's own one, or any, opens.
    let mut bytes = world.bytes(&key).await;
    *bytes.last_mut().unwrap() ^= 1;
    world.replace(&key, bytes).await;
    same(&reads(&opened(&world, &second).await, 1).await.unwrap(), &wal(1));
    let meta = format!("keys/{}", world.keys.meta_key().id());
    world.replace(&meta, b"damaged".to_vec()).await;
    opened(&world, &world.keys).await;
}

#[tokio::test]
async fn a_copy_brings_every_envelope() {
    let world = World::new().await;
    let (second, recipient) = another(&world);
    put_whole(&world.repo, &wal(1), 1).await;
    add(&world.repo, &recipient).await;
    world.repo.open_to(&recipient).await.unwrap();
    let target: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let to = Repository::create("second", target.clone(), &world.keys).await.unwrap();
    let id = world.repo.writing_key().await.unwrap().key.id();
    let ids: Vec<_> = world
        .names()
        .await
        .into_iter()
        .filter_map(|name| match Name::parse(&name).ok()?.object {
            Object::Key(id) => Some(id),
            _ => None,
        })
        .filter(|key| *key != id && *key != world.keys.meta_key().id())
        .collect();
    for id in &ids {
        to.copy_key(&world.repo, *id).await.unwrap();
    }
    let other = Repository::open("second", target, second).await.unwrap();
    for id in ids {
        other.reading_key(id).await.unwrap();
    }
}

#[tokio::test]
async fn a_key_that_only_writes_opens_nothing_to_anybody() {
    let world = World::new().await;
    let (_, recipient) = another(&world);
    let repo = Repository::open("main", world.store.clone(), world.keys.write_only()).await.unwrap();
    let error = repo.open_to(&recipient).await.unwrap_err();
    assert!(error.to_string().contains("can write and cannot read"), "{error}");
    // It wraps for whom the list says.
    add(&world.repo, &recipient).await;
    put_whole(&repo, &wal(1), 1).await;
    assert_eq!(repo.recipients().await.unwrap().unwrap().recipients.len(), 2);
}
