//! The program as it is typed: help, usage, exit codes, JSON.

use std::process::{Command, Output};

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// In an empty directory and without the environment's configuration.
fn pgkeep(args: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_pgkeep"))
        .args(args)
        .current_dir(&folder)
        .env_remove("PGKEEP_CONFIG")
        .env_remove("PGKEEP_LOG")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Every command with the words before it: `["wal", "push"]`.
fn commands() -> Vec<(Vec<String>, clap::Command)> {
    fn collect(path: &[String], command: &clap::Command, all: &mut Vec<(Vec<String>, clap::Command)>) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let path = [path, &[sub.get_name().to_owned()]].concat();
            all.push((path.clone(), sub.clone()));
            collect(&path, sub, all);
        }
    }
    let mut all = Vec::new();
    collect(&[], &pgkeep::cli::command(), &mut all);
    all
}

#[test]
fn every_command_has_help_with_an_example() {
    let all = commands();
    assert!(all.len() >= 10, "{all:?}");
    for (path, _) in all {
        let args: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let run = pgkeep(&args);
        assert_eq!(run.code, Some(0), "{path:?}: {}", run.stderr);
        let (_, example) = run.stdout.split_once("Example").unwrap_or_else(|| panic!("{path:?} has no example"));
        assert!(example.contains("pgkeep "), "{path:?}: {example}");
    }
}

/// The reference is complete: each command, each of its options.
#[test]
fn the_reference_names_every_command_and_option() {
    let page = include_str!("../docs/reference/commands.md");
    let section = |name: &str| {
        let (_, rest) = page.split_once(&format!("\n## {name}\n")).unwrap_or_else(|| panic!("no section {name}"));
        rest.split("\n## ").next().unwrap_or(rest).to_owned()
    };
    let everywhere = section("Everywhere");
    for global in pgkeep::cli::command().get_arguments().filter_map(clap::Arg::get_long) {
        assert!(matches!(global, "help" | "version") || everywhere.contains(&format!("`--{global}")), "--{global}");
    }
    for (path, command) in commands().into_iter().filter(|(_, command)| !command.has_subcommands()) {
        let text = section(&format!("pgkeep {}", path.join(" ")));
        for option in command.get_arguments().filter_map(clap::Arg::get_long).filter(|long| *long != "help") {
            assert!(text.contains(&format!("`--{option}")), "{path:?}: --{option} is not in the reference");
        }
    }
}

#[test]
fn the_version_is_the_crates() {
    let run = pgkeep(&["--version"]);
    assert_eq!((run.code, run.stdout.trim()), (Some(0), concat!("pgkeep ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn bad_usage_is_2() {
    for args in [&["bakup"][..], &[], &["restore", "--to", "latest"], &["list", "-q", "-v"], &["plan", "--to"]] {
        let run = pgkeep(args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stdout.is_empty() && !run.stderr.is_empty());
    }
}

#[test]
fn errors_are_documents_with_json() {
    let run = pgkeep(&["--json", "bakup"]);
    assert_eq!(run.code, Some(2));
    let document: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((document["error"]["code"].as_i64(), document["error"]["kind"].as_str()), (Some(2), Some("usage")));
    assert!(document["error"]["message"].as_str().unwrap().contains("bakup"));
    assert!(run.stderr.contains("bakup"), "a person reads stderr: {}", run.stderr);
}

/// The words of the hooks are ordinary values elsewhere.
#[test]
fn a_cluster_called_wal_is_no_hook() {
    for name in ["wal", "fetch", "push"] {
        assert_eq!(pgkeep(&["--config", "/nonexistent.toml", "list", "--cluster", name]).code, Some(2), "{name}");
    }
}

/// `restore_command` must never take a mistake for "not in the archive": that would end recovery early.
#[test]
fn p7_a_misspelt_restore_command_stops_recovery() {
    for args in [
        &["wal", "fetch"][..],
        &["wal", "fecth", "f", "p"],
        &["--confg", "x", "wal", "fetch", "f", "p"],
        &["wal", "fetch", "f", "p", "--path", "nonsense"],
        &["wla", "fetch", "f", "p"],
    ] {
        let run = pgkeep(args);
        assert!(run.code.is_some_and(|code| code > 125 && code != 143), "{args:?}: {:?} {}", run.code, run.stderr);
    }
}

/// Above 125 PostgreSQL's archiver process itself would end.
#[test]
fn pitfall_22_archive_command_never_exits_above_125() {
    for args in [&["wal", "push"][..], &["wal", "push", "a", "b"], &["--confg", "x", "wal", "push", "a"]] {
        let run = pgkeep(args);
        assert_eq!(run.code, Some(1), "{args:?}: {}", run.stderr);
    }
}
