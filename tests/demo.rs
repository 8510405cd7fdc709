//! `pgkeep demo`, as a newcomer runs it.

#[path = "support/s3/mod.rs"]
mod s3;
mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The whole story: protect, lose, plan, restore, prove; and nothing is left behind.
#[test]
fn the_demo_tells_its_story_and_cleans_up() {
    support::covered(support::any_major());
    let temp = tempfile::tempdir().unwrap();
    // Readable for the server's user, as /tmp is.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
    std::fs::set_permissions(temp.path(), mode).unwrap();
    let since = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_pgkeep"))
        .arg("demo")
        .env("TMPDIR", temp.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (story, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{story}\n{errors}", output.status);
    for told in
        ["DROP TABLE", "pgkeep plan --to", "pgkeep restore --to", "orders is back", "backup successfully verified"]
    {
        assert!(story.contains(told), "the story lacks {told:?}:\n{story}");
    }
    let lines = story.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((20..=45).contains(&lines), "about thirty lines, not {lines}:\n{story}");
    assert!(since.elapsed() < Duration::from_secs(240), "it took {:?}", since.elapsed());
    let left: Vec<_> = std::fs::read_dir(temp.path()).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// The same with a bucket: what others keep in it stays, what the demo put there goes.
#[test]
fn the_demo_in_a_bucket_leaves_the_bucket_as_it_was() {
    support::covered(support::any_major());
    let bucket = s3::TestS3::start(s3::TestS3Options::default());
    bucket.plant("somebody/elses", "object");
    let url = format!("s3://{}", bucket.bucket());
    let output = Command::new(env!("CARGO_BIN_EXE_pgkeep"))
        .args(["demo", "--repo", &url, "--endpoint", &bucket.endpoint()])
        .env("AWS_ACCESS_KEY_ID", bucket.access_key())
        .env("AWS_SECRET_ACCESS_KEY", bucket.secret_key())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (story, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{story}\n{errors}", output.status);
    assert!(story.contains("orders is back") && story.contains("pgkeep-demo-"), "{story}");
    assert!(!story.contains(bucket.secret_key()));
    assert_eq!(bucket.objects().into_keys().collect::<Vec<_>>(), ["somebody/elses"]);
    assert!(bucket.count("PutObject") > 10, "it was there: {:?}", bucket.requests());
}
