use super::*;
use crate::catalog::events::verify::{Finding, heads, unnamed_heads, verify};
use crate::catalog::events::{Content, EventHead, HEADS, Happened};
use crate::types::Lsn;

fn began(at: u64) -> Happened {
    Happened::StreamBegan { branch: branch(1), at: Lsn::new(at) }
}

async fn findings(repo: &Repository, outside: &[EventHead]) -> Vec<Finding> {
    let (events, unknown) = repo.events(&cluster()).await.unwrap();
    assert_eq!(unknown, Vec::<String>::new());
    verify(&events, outside)
}

fn name(head: &EventHead) -> String {
    format!("{}/event/{}/{:06}", cluster(), head.writer, head.number)
}

/// Two runs that take turns.
async fn written(world: &World) -> (Repository, Repository, Vec<EventHead>) {
    let (one, other) = (world.other().await, world.other().await);
    let mut written = Vec::new();
    for at in 0..6 {
        let repo = if at % 3 == 2 { &other } else { &one };
        written.push(repo.append_event(&cluster(), began(at)).await.unwrap());
    }
    (one, other, written)
}

#[tokio::test]
async fn events_are_numbered_chained_and_found_whole() {
    let world = World::new().await;
    let (one, other, written) = written(&world).await;
    assert_eq!(written.iter().map(|head| head.number).collect::<Vec<_>>(), [1, 2, 1, 3, 4, 2]);
    let (events, _) = world.repo.events(&cluster()).await.unwrap();
    assert_eq!(events.len(), 6);
    assert_eq!(verify(&events, &written), []);
    assert_eq!(heads(&events).len(), 2);
    assert_eq!(unnamed_heads(&events), [written[5]], "the other one is named by it");
    // Two tasks of one run at the same time.
    let c = cluster();
    let (a, b) = tokio::join!(one.append_event(&c, began(7)), one.append_event(&c, began(8)));
    let mut numbers = [a.unwrap().number, b.unwrap().number];
    numbers.sort_unstable();
    assert_eq!(numbers, [5, 6]);
    assert_eq!(findings(&other, &written).await, []);
    assert!(world.repo.load(&cluster()).await.unwrap().unknown.is_empty());
    assert!(world.repo.survey(&cluster()).await.unwrap().inventory.unknown.is_empty());
}

#[tokio::test]
async fn p4_removed_flipped_renamed_and_rolled_back_events_are_named() {
    let world = World::new().await;
    let (_, _, written) = written(&world).await;
    let remove = |head: EventHead| {
        let store = world.store.clone();
        async move { store.delete(&Key::new(name(&head)).unwrap()).await.unwrap() }
    };
    let put = |head: EventHead, bytes: Vec<u8>| {
        let store = world.store.clone();
        async move {
            store.put_new(&Key::new(name(&head)).unwrap(), Body::from(bytes)).await.unwrap();
        }
    };
    // Removed from the middle, and from the end of a chain that another run saw.
    for head in [written[1], written[4]] {
        let bytes = world.bytes(&name(&head)).await;
        remove(head).await;
        let found = findings(&world.repo, &[]).await;
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().starts_with("REMOVED: event"), "{}", found[0]);
        put(head, bytes).await;
    }
    // Flipped.
    let bytes = world.bytes(&name(&written[3])).await;
    let mut flipped = bytes.clone();
    flipped[200] ^= 1;
    world.replace(&name(&written[3]), flipped).await;
    let found = findings(&world.repo, &[]).await;
    assert!(matches!(found.as_slice(), [Finding::Unreadable { number: 3, .. }]), "{found:?}");
    // Renamed: two events exchanged.
    let second = world.bytes(&name(&written[1])).await;
    world.replace(&name(&written[1]), bytes.clone()).await;
    world.replace(&name(&written[3]), second.clone()).await;
    let found = findings(&world.repo, &[]).await;
    assert!(
        matches!(found.as_slice(), [Finding::Moved { number: 2, .. }, Finding::Moved { number: 3, .. }]),
        "{found:?}"
    );
    world.replace(&name(&written[1]), second).await;
    world.replace(&name(&written[3]), bytes).await;
    assert_eq!(findings(&world.repo, &written).await, []);
    // The end cut off: in itself all is well.
    remove(written[5]).await;
    assert_eq!(findings(&world.repo, &[]).await, []);
    let found = findings(&world.repo, &written[5..]).await;
    assert!(matches!(found.as_slice(), [Finding::RolledBack { number: 2, last: Some(1), .. }]), "{found:?}");
    // Whoever has the meta key writes another one in its place: it fits the chain, and not the head.
    let usage = Usage { writer: written[5].writer, ..Usage::new().unwrap() };
    let forger = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    forger.append_event(&cluster(), began(99)).await.unwrap();
    assert_eq!(findings(&world.repo, &[]).await, []);
    let found = findings(&world.repo, &written[5..]).await;
    assert!(matches!(found.as_slice(), [Finding::Replaced { number: 2, .. }]), "{found:?}");
}

#[tokio::test]
async fn heads_of_others_are_bounded_and_another_repositorys_events_do_not_open() {
    let world = World::new().await;
    for at in 0..HEADS as u64 + 4 {
        world.other().await.append_event(&cluster(), began(at)).await.unwrap();
    }
    let (events, _) = world.repo.events(&cluster()).await.unwrap();
    let most = events.iter().map(|event| match &event.content {
        Content::Opened { record, .. } => record.heads.len(),
        other => panic!("{other:?}"),
    });
    assert_eq!(most.max(), Some(HEADS));
    assert_eq!(verify(&events, &[]), []);
    // The same realm, another repository: events are no news there.
    let target: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let second = Repository::create("second", target.clone(), &world.keys).await.unwrap();
    let from = world.names().await.into_iter().find(|name| name.contains("/event/")).unwrap();
    target.put_new(&Key::new(from.clone()).unwrap(), Body::from(world.bytes(&from).await)).await.unwrap();
    let found = verify(&second.events(&cluster()).await.unwrap().0, &[]);
    assert!(matches!(found.as_slice(), [Finding::Moved { .. }]), "{found:?}");
}

/// What `docs/format.md` says of the record.
#[test]
fn the_record_is_written_as_it_is_described() {
    use crate::catalog::events::EventRecord;
    let record = EventRecord {
        writer: crate::types::Id128::new([1; 16]),
        number: 2,
        at: "2026-11-20T03:15:00Z".parse().unwrap(),
        previous: Some(Digest::of(b"")),
        heads: Vec::new(),
        event: began(16),
    };
    let json = crate::catalog::records::to_json(&record).unwrap();
    let text = String::from_utf8(json.clone()).unwrap();
    let want = format!(
        r#"{{"record":"event","writer":"{}","number":2,"at":"2026-11-20T03:15:00Z","previous":"{}","event":{{"kind":"stream-began","branch":"00000001","at":"0/10"}}}}"#,
        "01".repeat(16),
        Digest::of(b"")
    );
    assert_eq!(text, want);
    assert_eq!(crate::catalog::records::from_json::<EventRecord>(&json).unwrap(), record);
    // A newer version's kind is no fault.
    let newer = text.replace("stream-began", "tea-made").replace("\"branch\"", "\"sugar\"");
    let read = crate::catalog::records::from_json::<EventRecord>(newer.as_bytes()).unwrap();
    assert_eq!(read.event, Happened::Other);
}
