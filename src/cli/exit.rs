//! How pgkeep ends: the exit codes are a contract with scripts, and, for the hooks, with PostgreSQL.

use std::ffi::OsStr;

/// How a command ended. The number is its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Done, or the answer is yes.
    Done = 0,
    /// The answer is no: target not reachable, check failed, file not in the archive.
    No = 1,
    /// Bad usage or configuration: a person has to change what was typed or written.
    Usage = 2,
    /// Could not; another try may help.
    Failed = 3,
    /// Refused, to protect data: conflict, foreign cluster, directory that is not empty.
    Refused = 4,
}

impl Exit {
    /// The exit code.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The word for it in `--json` errors.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::No => "no",
            Self::Usage => "usage",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// The commands that PostgreSQL runs. Their exit codes follow its rules, not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// `archive_command`: 0 is durable, 1 is "ask again". Above 125 the archiver process itself would end.
    Push,
    /// `restore_command`: 1 is "not in the archive", on which the server may promote. So only that answer may be 1; every
    /// fault, a misspelt command line too, is above 125, which stops recovery.
    Fetch,
}

/// What stops recovery. Not 128 and more with a signal's number: 143 would mean a clean stop.
const STOP_RECOVERY: u8 = 200;

impl Hook {
    /// The exit code for `exit`; `None` is a panic.
    pub const fn code(self, exit: Option<Exit>) -> u8 {
        match (self, exit) {
            (_, Some(Exit::Done)) => 0,
            (Self::Push, _) | (Self::Fetch, Some(Exit::No)) => 1,
            (Self::Fetch, Some(Exit::Usage | Exit::Failed | Exit::Refused) | None) => STOP_RECOVERY,
        }
    }

    /// Which hook a command line that does not parse was meant to be: `wal push`, or anything else that speaks of `wal`
    /// or `fetch`. In doubt it is `Fetch`: a misspelt restore_command must not end recovery early.
    pub fn meant_by(args: &[impl AsRef<OsStr>]) -> Option<Hook> {
        let has = |word: &str| args.iter().skip(1).any(|arg| arg.as_ref() == word);
        match (has("wal"), has("push"), has("fetch")) {
            (true, true, false) => Some(Hook::Push),
            (true, _, _) | (false, false, true) => Some(Hook::Fetch),
            (false, _, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_contract() {
        let all = [Exit::Done, Exit::No, Exit::Usage, Exit::Failed, Exit::Refused];
        assert_eq!(all.map(Exit::code), [0, 1, 2, 3, 4]);
        // archive_command: never above 125, whatever happens.
        assert_eq!(all.map(|exit| Hook::Push.code(Some(exit))), [0, 1, 1, 1, 1]);
        assert_eq!(Hook::Push.code(None), 1);
        // restore_command: 1 only for "not in the archive".
        assert_eq!(all.map(|exit| Hook::Fetch.code(Some(exit))), [0, 1, 200, 200, 200]);
        assert_eq!(Hook::Fetch.code(None), 200);
    }

    #[test]
    fn a_hook_is_known_by_its_words() {
        let cases: [(&[&str], Option<Hook>); 9] = [
            (&["pgkeep", "wal", "push", "pg_wal/x"], Some(Hook::Push)),
            (&["pgkeep", "--config", "x", "wal", "-q", "push"], Some(Hook::Push)),
            (&["pgkeep", "wal", "fetch", "f", "p"], Some(Hook::Fetch)),
            (&["pgkeep", "--confg", "x", "wal", "fetch"], Some(Hook::Fetch)),
            (&["pgkeep", "wal", "fecth"], Some(Hook::Fetch)),
            (&["pgkeep", "wla", "fetch"], Some(Hook::Fetch)),
            (&["pgkeep", "wal"], Some(Hook::Fetch)),
            (&["pgkeep", "backup"], None),
            (&["wal", "list"], None), // the name of the program is no word of the command
        ];
        for (args, want) in cases {
            assert_eq!(Hook::meant_by(args), want, "{args:?}");
        }
    }
}
