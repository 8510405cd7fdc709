//! What makes a drill's server harmless: pure text.
//!
//! The server is given a configuration file of our own, so that nothing of the restored `postgresql.conf` counts: neither files
//! that it includes, nor libraries that it loads, nor memory for another machine. What `postgresql.auto.conf` says besides the
//! settings of recovery is overridden on the command line, which wins over every file.

use std::path::Path;

/// The file's name in the scratch directory.
pub const CONF: &str = "drill.conf";
/// Likewise, of who may connect.
pub const HBA: &str = "drill-hba.conf";
/// Likewise; empty.
pub const IDENT: &str = "drill-ident.conf";

/// Who reaches the socket, whose directory only the server's user may enter, may be anybody.
pub const HBA_TEXT: &str = "local all all trust\n";

/// What the file says.
pub const CONF_TEXT: &str = "\
# Of a drill's server: pgkeep wrote it, and removes it.
lc_messages = 'C'
timezone = 'UTC'
log_min_messages = warning
log_line_prefix = '%m [%p] '
";

/// Settings for the command line.
pub fn settings(dir: &Path, data: &Path, major: u32) -> Vec<String> {
    let file = |name: &str| dir.join(name).display().to_string();
    let mut all = vec![
        format!("config_file={}", file(CONF)),
        format!("data_directory={}", data.display()),
        format!("hba_file={}", file(HBA)),
        format!("ident_file={}", file(IDENT)),
        format!("external_pid_file={}", data.join("drill.pid").display()),
    ];
    let fixed = [
        "ssl=off",
        "unix_socket_permissions=0700",
        "unix_socket_group=",
        // Nothing of it goes anywhere, and nothing from elsewhere comes in.
        "archive_mode=off",
        "archive_command=",
        "primary_conninfo=",
        "primary_slot_name=",
        "synchronous_standby_names=",
        "max_logical_replication_workers=0",
        "archive_cleanup_command=",
        "recovery_end_command=",
        // No jobs: neither ours nor those of extensions (pg_cron, pg_partman_bgw, timescaledb).
        "shared_preload_libraries=",
        "session_preload_libraries=",
        "local_preload_libraries=",
        "autovacuum=off",
        // It is thrown away, on a host that has other things to do.
        "fsync=off",
        "full_page_writes=off",
        "synchronous_commit=off",
        "shared_buffers=128MB",
        "huge_pages=off",
        "max_wal_size=1GB",
        "max_parallel_workers=2",
        "jit=off",
        "hot_standby=on",
        "statement_timeout=0",
        "default_transaction_read_only=off",
    ];
    all.extend(fixed.map(str::to_owned));
    if major >= 15 {
        all.push("archive_library=".to_owned());
    }
    if major >= 17 {
        all.push("event_triggers=off".to_owned());
        all.push("sync_replication_slots=off".to_owned());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out_of_the_scratch_directory() {
        for major in 13..=18 {
            let all = settings(Path::new("/scratch"), Path::new("/scratch/data"), major);
            let value = |name: &str| {
                let of = all.iter().filter_map(|line| line.split_once('=')).filter(|(set, _)| *set == name);
                let values: Vec<&str> = of.map(|(_, value)| value).collect();
                assert_eq!(values.len(), 1, "{name}");
                values[0]
            };
            for empty in
                ["archive_command", "primary_conninfo", "shared_preload_libraries", "synchronous_standby_names"]
            {
                assert_eq!(value(empty), "");
            }
            for file in ["config_file", "data_directory", "hba_file", "ident_file", "external_pid_file"] {
                assert!(value(file).starts_with("/scratch/"));
            }
            assert_eq!((value("archive_mode"), value("max_logical_replication_workers")), ("off", "0"));
            assert_eq!(all.iter().any(|line| line.starts_with("archive_library=")), major >= 15);
            assert_eq!(all.iter().any(|line| line.starts_with("event_triggers=")), major >= 17);
        }
    }
}
