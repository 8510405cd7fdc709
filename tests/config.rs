//! The configuration file as a user writes it: what is taken, and what a mistake is answered with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgkeep::config::{
    ALERT_SETTINGS, AlertWay, CLUSTER_SETTINGS, Config, ConfigError, DAEMON_SETTINGS, KeyOrigin, LockMode, ObjectLock,
    Place, REPOSITORY_SETTINGS, Setting, WebhookFormat, When,
};

const FILE: &str = "/etc/pgkeep/pgkeep.toml";

const GOOD: &str = r#"[repository.main]
path = "/srv/pgkeep"
key_file = "main.key"

[cluster.main]
conninfo = "host=/run/postgresql user=postgres password=hunter2"
repositories = ["main"]
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new(FILE))
}

fn mistake(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

/// `GOOD` with `lines` at the end of its last section.
fn good_and(lines: &str) -> String {
    format!("{GOOD}{lines}\n")
}

#[test]
fn the_smallest_file_has_the_defaults() {
    let config = parse(GOOD).unwrap();
    let cluster = config.cluster(None).unwrap();
    assert_eq!((cluster.slot.as_str(), cluster.application_name.as_str()), ("pgkeep", "pgkeep"));
    assert_eq!((cluster.max_delay, cluster.synchronous), (Duration::from_secs(1), false));
    assert_eq!(cluster.name_in_repository.as_str(), "main");
    let repository = config.repository_of(cluster).unwrap();
    assert_eq!(repository.place, Place::Directory("/srv/pgkeep".into()));
    // A relative path is relative to the file.
    assert_eq!(repository.key.origin, KeyOrigin::File("/etc/pgkeep/main.key".into()));
}

#[test]
fn everything_that_can_be_written_is_taken() {
    let text = good_and(
        r#"acknowledge = 1
slot = "pgkeep_2"
name_in_repository = "old-name"
application_name = "pgkeep (spare)"
max_delay = "250ms"
synchronous = true
range_interval = "40ms"
shutdown_deadline = "1m 30s"
fill_rate = "50MB/s"
index = false
keep = { window = "7d", daily = 14, weekly = 8, monthly = 12, yearly = 7, at_least = 2 }
keep_in = { main = { window = "90d 12h" } }
verify_within = "90d"
verify_rate = "5MB/s"
drill = { scratch = "scratch", every = "7d", max_bytes = "200GB", bindir = "/opt/pg/bin", user = "admin", database = "shop", assertions = ["select true"] }"#,
    );
    let config = parse(&text).unwrap();
    let cluster = &config.clusters[0];
    assert_eq!(cluster.max_delay, Duration::from_millis(250));
    assert_eq!(cluster.shutdown_deadline, Duration::from_secs(90));
    assert_eq!(cluster.range_interval, Duration::from_millis(40));
    assert_eq!(cluster.fill_rate.map(u64::from), Some(50_000_000));
    assert_eq!(cluster.name_in_repository.as_str(), "old-name");
    assert!(cluster.synchronous && !cluster.index && parse(GOOD).unwrap().clusters[0].index);
}

#[test]
fn verification_and_drills_are_set_per_cluster() {
    let cluster = &parse(GOOD).unwrap().clusters[0];
    assert_eq!(cluster.verify.within.map(|within| within.as_hours()), Some(720));
    assert_eq!((cluster.verify.rate.get(), &cluster.drill), (20_000_000, &None));
    let cluster = &parse(&good_and("verify_within = \"off\"\ndrill = { scratch = \"/x\" }")).unwrap().clusters[0];
    assert_eq!(cluster.verify.within, None);
    let drill = cluster.drill.as_ref().unwrap();
    assert_eq!((drill.user.as_str(), drill.every, drill.assertions.len()), ("postgres", None, 0));
    for (lines, words) in [
        ("verify_within = \"1h\"", "1 day to 366 days"),
        ("verify_rate = \"5\"", "verify_rate"),
        ("drill = \"weekly\"", "drill is a table"),
        ("drill = { every = \"7d\" }", "needs scratch"),
        ("drill = { scrach = \"/x\" }", "did you mean \"scratch\""),
        ("drill = { scratch = \"/x\", every = \"0d\" }", "every = \"0d\""),
        ("drill = { scratch = \"/x\", max_bytes = \"much\" }", "200GB"),
        ("drill = { scratch = \"/x\", assertions = [\" \"] }", "an assertion is empty"),
    ] {
        let said = mistake(&good_and(lines));
        assert!(said.contains(words), "{lines}: {said}");
    }
}

#[test]
fn each_repository_has_its_policy() {
    let spare = "[repository.spare]\npath = \"/spare\"\nkey_file = \"k\"\n";
    let text = GOOD.replace("[\"main\"]", "[\"main\", \"spare\"]") + "keep = { window = \"7d\", at_least = 2 }\n";
    let config = parse(&format!("{text}keep_in = {{ spare = {{ yearly = 7 }} }}\n{spare}")).unwrap();
    let keep = &config.clusters[0].keep;
    assert_eq!((keep["main"].window.as_hours(), keep["main"].at_least, keep["main"].yearly), (7 * 24, 2, 0));
    assert_eq!((keep["spare"].window.as_hours(), keep["spare"].at_least, keep["spare"].yearly), (0, 1, 7));
    assert!(parse(GOOD).unwrap().clusters[0].keep.is_empty());
    let cases = [
        ("keep = {}", "asks for nothing"),
        ("keep = { window = \"0s\", daily = 0 }", "asks for nothing"),
        ("keep = { daily = 3, at_least = 0 }", "the newest sound base backup always stays"),
        ("keep = { window = \"1 month\" }", "a month has no fixed length"),
        ("keep = { window = \"-3d\" }", "is not a span"),
        ("keep = { window = \"200000d\" }", "longer than a hundred years"),
        ("keep = { daily = -1 }", "out of range"),
        ("keep = { yearly = 100000 }", "out of range"),
        ("keep = \"7d\"", "keep is a table"),
        ("keep_in = { main = \"7d\" }", "a policy of its own"),
    ];
    for (line, want) in cases {
        let said = mistake(&good_and(line));
        assert!(said.contains(want), "{line}: {said}");
    }
}

#[test]
fn when_base_backups_are_taken() {
    let of = |lines: &str| parse(&good_and(lines)).unwrap().clusters[0].schedule.clone();
    assert!(parse(GOOD).unwrap().clusters[0].schedule.is_empty());
    let nightly = of("backup = \"0 3 * * *\"\nbackup_time_zone = \"Europe/Berlin\"");
    let Some(When::Cron(times)) = &nightly.when else { panic!("{nightly:?}") };
    let next = times.after("2026-07-01T12:00:00Z".parse().unwrap()).unwrap();
    assert_eq!(next.to_string(), "2026-07-02T01:00:00Z");
    let both = of("backup_every = \"1d\"\nrestore_within = \"30m\"");
    assert_eq!(both.when, Some(When::Every(Duration::from_secs(86_400))));
    assert_eq!(both.restore_within, Some(Duration::from_secs(1800)));
    let cases = [
        ("backup = \"0 3 * *\"", "is not five fields as in crontab"),
        ("backup = \"0 25 * * *\"", "is not five fields as in crontab"),
        ("backup = \"0 0 31 2 *\"", "never comes"),
        ("backup = \"0 3 * * *\"\nbackup_every = \"24h\"", "leave one of them"),
        ("backup = \"0 3 * * *\"\nbackup_time_zone = \"Europe/Berlim\"", "is no time zone"),
        ("backup_time_zone = \"Europe/Berlin\"", "goes with backup"),
        ("backup_every = \"0s\"", "out of range"),
        ("backup_every = \"daily\"", "is not a span"),
        ("restore_within = \"-1h\"", "is not a span"),
    ];
    for (lines, want) in cases {
        let said = mistake(&good_and(lines));
        assert!(said.contains(want) && (said.contains(":8:") || said.contains(":9:")), "{lines}: {said}");
    }
}

#[test]
fn what_is_shown_and_who_is_told() {
    let text = good_and(
        r#"[daemon]
listen = "[::1]:9187"
behind = "90s"
behind_bytes = "200MB"
refresh = "1h"
[alert.chat]
webhook = "https://hooks.example/services/hunter2"
format = "slack"
quiet = "22:00-06:00"
quiet_time_zone = "Europe/Berlin"
repeat = "4h"
[alert.page]
command = ["/usr/local/bin/page", "--team", "db"]
[alert.pulse]
heartbeat = "http://beat.example:8080/hunter2"
every = "30s""#,
    );
    let config = parse(&text).unwrap();
    assert_eq!(config.daemon.listen.unwrap().port(), 9187);
    assert_eq!((config.daemon.behind.as_secs(), config.daemon.behind_bytes), (90, 200_000_000));
    assert_eq!(config.daemon.refresh.as_secs(), 3600);
    let [chat, page, pulse] = config.alerts.as_slice() else { panic!("{config:?}") };
    assert!(matches!(&chat.way, AlertWay::Webhook { format: WebhookFormat::Slack, .. }) && chat.quiet.is_some());
    assert!(matches!(&page.way, AlertWay::Command(command) if command.len() == 3));
    assert!(matches!(&pulse.way, AlertWay::Heartbeat { every, .. } if every.as_secs() == 30));
    assert!(!format!("{config:?}").contains("hunter2"), "a URL may hold a secret");
    let cases = [
        ("[daemon]\nlisten = \"9187\"", ":9:", "is not an address and port"),
        ("[daemon]\nlisen = \"127.0.0.1:1\"", ":9:", "did you mean \"listen\"?"),
        ("[deamon]\nlisten = \"127.0.0.1:1\"", ":8:", "did you mean [daemon]?"),
        ("[daemon]\nbehind_bytes = \"1\"", ":9:", "is not a size"),
        ("[alert.x]\nrepeat = \"1h\"", ":8:", "needs one of webhook, command, heartbeat"),
        ("[alert.x]\nwebhook = \"hunter2\"", ":9:", "is not a URL"),
        ("[alert.x]\nwebhook = \"https://a/\"\nformat = \"xml\"", ":10:", "neither \"json\" nor \"slack\""),
        ("[alert.x]\ncommand = []", ":9:", "is empty"),
        ("[alert.x]\ncommand = [\"x\"]\nquiet = \"at night\"", ":10:", "is not hours"),
        ("[alert.x]\ncommand = [\"x\"]\nevery = \"1m\"", ":10:", "goes with heartbeat"),
        ("[alert.x]\nheartbeat = \"http://a/\"\nquiet = \"1:00-2:00\"", ":10:", "no meaning for a heartbeat"),
        ("[alert.x]\nwebhok = \"https://a/\"", ":9:", "did you mean \"webhook\"?"),
    ];
    for (lines, line, want) in cases {
        let said = mistake(&good_and(lines));
        assert!(said.contains(want) && said.contains(line) && !said.contains("hunter2"), "{lines}: {said}");
    }
}

#[test]
fn a_misspelt_name_is_answered_with_the_nearest() {
    let cases = [
        (good_and("max_dealy = \"1s\""), ":8:", "did you mean \"max_delay\"?"),
        (good_and("[repository.spare]\npath = \"/x\"\nkeyfile = \"k\""), ":10:", "did you mean \"key_file\"?"),
        (good_and("key_file = \"k\""), ":8:", "it belongs into [repository.NAME]"),
        (good_and("[clusters.spare]\nslot = \"x\""), ":8:", "did you mean [cluster.NAME]?"),
        (good_and("zzz = \"blue\""), ":8:", "there are conninfo, repositories,"),
        (good_and("keep = { dayly = 3 }"), ":8:", "did you mean \"daily\"?"),
        (good_and("keep_in = { main = { windows = \"3d\" } }"), ":8:", "did you mean \"window\"?"),
        (good_and("keep_in = { mian = { window = \"3d\" } }"), ":8:", "did you mean \"main\"?"),
        ("[repository]\npath = \"/x\"\n".to_owned(), ":2:", "write path below [repository.main]"),
        (GOOD.replace("[\"main\"]", "[\"mian\"]"), ":7:", "did you mean \"main\"?"),
    ];
    for (text, line, want) in cases {
        let message = mistake(&text);
        assert!(
            message.contains(&format!("{FILE}{line}")) && message.contains(want),
            "{message}\nwanted {line} {want}"
        );
    }
}

#[test]
fn values_out_of_range_are_answered_with_the_range() {
    let cases = [
        ("max_delay = \"0s\"", "10ms to 10m"),
        ("fill_rate = \"50\"", "such as \"50MB/s\""),
        ("fill_rate = \"5kB/s\"", "at least 100kB/s"),
        ("max_delay = \"1h\"", "10ms to 10m"),
        ("max_delay = \"-1s\"", "10ms to 10m"),
        ("max_delay = \"soon\"", "not a duration such as"),
        ("max_delay = 5", "invalid type"),
        ("range_interval = \"1m\"", "0s to 10s"),
        ("shutdown_deadline = \"1ms\"", "1s to 5m"),
        ("slot = \"Main-Slot\"", "a-z, 0-9 and _"),
        ("slot = \"\"", "at most 63"),
        ("application_name = \"schön\"", "printable ASCII"),
        ("acknowledge = 2", "can only be 1"),
        ("name_in_repository = \"keys\"", "`format` and `keys` are taken"),
        ("synchronous = \"yes\"", "invalid type"),
    ];
    for (line, want) in cases {
        let message = mistake(&good_and(line));
        assert!(message.contains(want) && message.contains(":8: "), "{line}: {message}");
    }
}

#[test]
fn several_repositories_and_how_many_acknowledge() {
    let two = format!("{}\n[repository.second]\npath = \"/mnt/second\"\nkey_file = \"main.key\"\n", GOOD);
    let with = |line: &str| two.replace("repositories = [\"main\"]", line);
    let both = parse(&with("repositories = [\"second\", \"main\"]")).unwrap();
    assert_eq!((both.clusters[0].repositories.join(","), both.clusters[0].acknowledge), ("second,main".to_owned(), 2));
    let one = parse(&with("repositories = [\"second\", \"main\"]\nacknowledge = 1")).unwrap();
    assert_eq!(one.clusters[0].acknowledge, 1);
    for (line, want) in [
        ("repositories = [\"main\", \"main\"]", "twice"),
        ("repositories = []", "is empty"),
        ("repositories = [\"main\", \"secund\"]", "did you mean \"second\"?"),
        ("repositories = [\"main\", \"second\"]\nacknowledge = 3", "with 2 repositories it is 1 to 2"),
        ("repositories = [\"main\", \"second\"]\nacknowledge = 0", "with 2 repositories it is 1 to 2"),
    ] {
        assert!(mistake(&with(line)).contains(want), "{line}: {}", mistake(&with(line)));
    }
}

#[test]
fn buckets_and_what_goes_with_them() {
    let at = |lines: &str| GOOD.replace("path = \"/srv/pgkeep\"", lines);
    let s3 = parse(&at(
        "url = \"s3://bucket/some/prefix/\"\nregion = \"eu-1\"\nendpoint = \"http://127.0.0.1:9000\"\nchecksum = \"none\"\n\
         object_lock = \"compliance\"\nobject_lock_days = 30\naccess_key_file = \"id\"\nsecret_key_file = \"secret\"",
    ))
    .unwrap();
    let Place::S3(place) = &s3.repositories[0].place else { panic!("{:?}", s3.repositories[0].place) };
    assert_eq!((place.bucket.as_str(), place.prefix.as_str()), ("bucket", "some/prefix"));
    assert_eq!(place.object_lock, Some(ObjectLock { mode: LockMode::Compliance, days: 30 }));
    assert!(place.credentials.as_ref().is_some_and(|files| files.secret_key_file.is_absolute()));
    assert_eq!(s3.repositories[0].place.to_string(), "s3://bucket/some/prefix");
    let azure = parse(&at("url = \"az://container\"\naccount = \"me\"")).unwrap();
    assert!(matches!(&azure.repositories[0].place, Place::Azure(place) if place.prefix.is_empty()));
    for (lines, want) in [
        ("url = \"bucket/prefix\"", "such as s3://bucket/prefix"),
        ("url = \"gss://bucket\"", "did you mean gs://?"),
        ("url = \"s3://\"", "such as s3://bucket/prefix"),
        ("url = \"s3://bucket/../other\"", "such as s3://bucket/prefix"),
        ("url = \"gs://bucket\"\nregion = \"x\"", "region does not go with"),
        ("path = \"/srv\"\nkms_key = \"x\"", "kms_key does not go with"),
        ("url = \"s3://b\"\naccount = \"x\"", "account does not go with"),
        ("url = \"s3://b\"\nobject_lock = \"compliance\"", "needs object_lock_days"),
        ("url = \"s3://b\"\nobject_lock = \"forever\"\nobject_lock_days = 1", "governance, compliance"),
        ("url = \"s3://b\"\nchecksum = \"md5\"", "auto, crc32c, sha256, none"),
        ("url = \"s3://b\"\naccess_key_file = \"x\"", "together"),
    ] {
        assert!(mistake(&at(lines)).contains(want), "{lines}: {}", mistake(&at(lines)));
    }
}

#[test]
fn what_is_missing_is_named() {
    let without = |line: &str| GOOD.lines().filter(|l| !l.starts_with(line)).collect::<Vec<_>>().join("\n");
    for (line, want) in [
        ("path", "[repository.main] needs path"),
        ("key_file", "one of key_file, key_env, key_command"),
        ("conninfo", "[cluster.main] needs conninfo"),
        ("repositories", "such as repositories = [\"main\"]"),
    ] {
        assert!(mistake(&without(line)).contains(want), "{}", mistake(&without(line)));
    }
    assert!(mistake("").contains("no [repository.NAME]"));
}

#[test]
fn all_mistakes_come_at_once_in_the_order_of_their_lines() {
    let message = mistake(&good_and("slot = \"X\"\nmax_delay = \"1h\""));
    let lines: Vec<_> = message.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains(":8:") && lines[1].contains(":9:"), "{message}");
}

#[test]
fn sections_must_not_share_a_place() {
    let twice = good_and("[repository.copy]\npath = \"/srv/pgkeep\"\nkey_file = \"k\"");
    assert!(mistake(&twice).contains("the same place"));
    let same_name = good_and("[cluster.b]\nconninfo = \"\"\nrepositories = [\"main\"]\nname_in_repository = \"main\"");
    assert!(mistake(&same_name).contains("choose another name_in_repository"));
}

/// What may be a password is in no Debug, and no message shows the line it stands on.
#[test]
fn secrets_stay_out_of_debug_and_messages() {
    assert!(!format!("{:?}", parse(GOOD).unwrap()).contains("hunter2"));
    let broken = [
        GOOD.replace("hunter2\"", "hunter2"),        // the string does not end
        good_and("conninfo = \"password=hunter2\""), // twice
        GOOD.replace("conninfo", "coninfo"),
        GOOD.replace("conninfo = ", "conninfo "),
        GOOD.replace("repositories = [", "repositories = [\"password=hunter2\", "),
    ];
    for text in broken {
        assert!(!mistake(&text).contains("hunter2"), "{}", mistake(&text));
    }
}

#[test]
fn one_is_taken_and_several_ask_which() {
    let two = good_and("[cluster.other]\nconninfo = \"host=b\"\nrepositories = [\"main\"]");
    let config = parse(&two).unwrap();
    let message = config.cluster(None).unwrap_err().to_string();
    assert!(message.contains("--cluster") && message.contains("main, other"), "{message}");
    assert_eq!(config.cluster(Some("other")).unwrap().name.as_str(), "other");
    assert!(config.cluster(Some("othr")).unwrap_err().to_string().contains("did you mean \"other\"?"));
    assert_eq!(config.clusters(None).unwrap().len(), 2);
    assert_eq!(config.clusters(Some("main")).unwrap().len(), 1);
}

#[test]
fn a_host_that_only_restores_needs_no_cluster() {
    let text = GOOD.split("[cluster").next().unwrap();
    let config = parse(text).unwrap();
    let read = config.read_from(Some("orders"), None).unwrap();
    assert_eq!(read.cluster.unwrap().as_str(), "orders");
    assert!(config.read_from(None, None).unwrap().cluster.is_none());
    assert!(config.read_from(Some("../x"), None).is_err());
    assert!(config.clusters(None).unwrap_err().to_string().contains("has no [cluster.NAME]"));
    // With clusters in the file, a name that is not there is a mistake unless the repository is named as well.
    let config = parse(&good_and("name_in_repository = \"stored\"")).unwrap();
    assert_eq!(config.read_from(None, None).unwrap().cluster.unwrap().as_str(), "stored");
    assert!(config.read_from(Some("mian"), None).is_err());
    assert_eq!(config.read_from(Some("gone"), Some("main")).unwrap().cluster.unwrap().as_str(), "gone");
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(&PathBuf::from("/nonexistent/pgkeep.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/pgkeep.toml"));
}

/// The reference is complete and promises nothing that is not there.
#[test]
fn the_reference_names_every_setting() {
    let page = include_str!("../docs/reference/configuration.md");
    let all = || -> Vec<&Setting> {
        [REPOSITORY_SETTINGS, CLUSTER_SETTINGS, DAEMON_SETTINGS, ALERT_SETTINGS].into_iter().flatten().collect()
    };
    for setting in all() {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", setting.name)));
        let row = row.unwrap_or_else(|| panic!("{} has no row", setting.name));
        if let Some(default) = setting.default {
            assert!(row.contains(&format!("`{default}`")), "{}: its default {default} is not in {row:?}", setting.name);
        }
    }
    let known = |name: &str| all().iter().any(|setting| setting.name == name);
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    for name in rows.filter(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')) {
        assert!(known(name), "{name} is in the reference, but no setting");
    }
}
