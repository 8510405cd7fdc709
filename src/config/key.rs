use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use secrecy::{SecretSlice, SecretString};
use zeroize::Zeroizing;

use super::ConfigError;

/// A key file is a few hundred bytes; whatever is longer is not one.
const MAX_BYTES: u64 = 64 << 10;

/// How long `key_command` may take. A person may have to touch a token; a hung agent must not hold the daemon for ever.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Where the key of a repository is, and the passphrase that opens it, if it is protected by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySource {
    /// Where the key is.
    pub origin: KeyOrigin,
    /// `passphrase_file`, absolute.
    pub passphrase_file: Option<PathBuf>,
}

/// Where the text of a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOrigin {
    /// `key_file`, absolute: readable by its owner only.
    File(PathBuf),
    /// `key_env`: the name of an environment variable that holds the text of a key file.
    Environment(String),
    /// `key_command`: run by `/bin/sh`; prints the text of a key file.
    Command(String),
}

impl fmt::Display for KeyOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Environment(name) => write!(f, "${name}"),
            Self::Command(_) => f.write_str("key_command"), // its arguments may hold a secret
        }
    }
}

/// A key as it was found; `Debug` shows nothing of it.
#[derive(Debug, Clone)]
pub struct KeyMaterial {
    /// The bytes of a key file: text, unless it is protected by a passphrase.
    pub bytes: SecretSlice<u8>,
    /// The passphrase, without the newline at its end.
    pub passphrase: Option<SecretString>,
}

impl KeySource {
    /// Reads the key of the repository called `repository`. Blocks: a file, or up to a minute for `key_command`.
    pub fn read(&self, repository: &str) -> Result<KeyMaterial, ConfigError> {
        let failed = |reason: String| ConfigError::Key { repository: repository.to_owned(), reason };
        let bytes = match &self.origin {
            KeyOrigin::File(path) => read_private(path).map_err(failed)?,
            KeyOrigin::Environment(name) => {
                let text = read_environment(name, std::env::var_os(name)).map_err(failed)?;
                Zeroizing::new(text.as_bytes().to_vec())
            }
            KeyOrigin::Command(command) => run_command(command, COMMAND_DEADLINE).map_err(failed)?,
        };
        let passphrase = match &self.passphrase_file {
            Some(path) => Some(read_passphrase(path).map_err(failed)?),
            None => None,
        };
        Ok(KeyMaterial { bytes: SecretSlice::from(bytes.to_vec()), passphrase })
    }
}

type Secret = Zeroizing<String>;
type SecretBytes = Zeroizing<Vec<u8>>;

/// A passphrase from a file that nobody else may read; it loses only the newline at its end.
///
/// # Errors
/// A sentence that names the file.
pub fn read_passphrase(path: &Path) -> Result<SecretString, String> {
    let text = read_private_text(path)?;
    match text.trim_end_matches(['\n', '\r']) {
        "" => Err(format!("the passphrase file {} is empty", path.display())),
        passphrase => Ok(SecretString::from(passphrase)),
    }
}

/// A line of text that is a secret, from a file that nobody else may read: credentials.
///
/// # Errors
/// A sentence that names the file.
pub fn read_secret(path: &Path) -> Result<SecretString, String> {
    let text = read_private_text(path)?;
    match text.trim() {
        "" => Err(format!("{} is empty", path.display())),
        text => Ok(SecretString::from(text)),
    }
}

/// Opens first and looks at the mode of what was opened, so that the file cannot be exchanged in between.
fn read_private(path: &Path) -> Result<SecretBytes, String> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| format!("cannot open {shown}: {error}"))?;
    let meta = file.metadata().map_err(|error| format!("cannot open {shown}: {error}"))?;
    if !meta.is_file() {
        return Err(format!("{shown} is not a file"));
    }
    if meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o777;
        return Err(format!("{shown} is open to other users (mode {mode:04o}); run: chmod 600 {shown}"));
    }
    read_bytes(file).map_err(|reason| format!("{shown}: {reason}"))
}

fn read_private_text(path: &Path) -> Result<Secret, String> {
    let bytes = read_private(path)?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(format!("{} is not text", path.display())),
    }
}

fn read_bytes(source: impl Read) -> Result<SecretBytes, String> {
    let mut bytes = Zeroizing::new(Vec::new());
    source.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("is longer than {MAX_BYTES} bytes: not a key"));
    }
    Ok(bytes)
}

fn read_environment(name: &str, value: Option<OsString>) -> Result<Secret, String> {
    match value.map(OsString::into_string) {
        Some(Ok(text)) if !text.is_empty() => Ok(Zeroizing::new(text)),
        Some(Ok(_)) | None => Err(format!("the environment variable {name} (key_env) is not set")),
        Some(Err(_)) => Err(format!("the environment variable {name} (key_env) is not text")),
    }
}

/// What the command writes to stderr goes to ours: it may ask a person for something.
fn run_command(command: &str, deadline: Duration) -> Result<SecretBytes, String> {
    let failed = |error: std::io::Error| format!("key_command could not be run: {error}");
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let Some(stdout) = child.stdout.take() else {
        return Err("key_command has no output".to_owned());
    };
    // Read aside: a pipe has no deadline of its own. A thread that is left behind ends with the pipe.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(read_bytes(stdout)));
    let until = Instant::now() + deadline;
    let text = receiver.recv_timeout(deadline);
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if Instant::now() >= until || text.is_err() => break None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let Some(status) = status else {
        let _ = child.kill(); // it may just have ended by itself
        let _ = child.wait();
        return Err(format!("key_command did not answer within {} s", deadline.as_secs()));
    };
    match text {
        Ok(Err(reason)) => Err(format!("what key_command printed {reason}")), // first: we may have closed its pipe
        _ if !status.success() => Err(format!("key_command failed: {status}")),
        Ok(Ok(text)) => Ok(text),
        Err(_) => Err(format!("key_command did not answer within {} s", deadline.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;
    use std::os::unix::fs::PermissionsExt;

    fn file_with_mode(mode: u32, text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn source(origin: KeyOrigin) -> KeySource {
        KeySource { origin, passphrase_file: None }
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused_with_the_remedy() {
        for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            let file = file_with_mode(mode, "KEY-TEXT");
            let read = source(KeyOrigin::File(file.path().to_owned())).read("main");
            match read {
                Ok(key) => assert!(fine && key.bytes.expose_secret() == b"KEY-TEXT", "{mode:o} was taken"),
                Err(error) => {
                    let message = error.to_string();
                    assert!(!fine, "{mode:o}: {message}");
                    let remedy = format!("chmod 600 {}", file.path().display());
                    assert!(message.contains(&remedy) && !message.contains("KEY-TEXT"), "{message}");
                }
            }
        }
    }

    #[test]
    fn a_passphrase_loses_only_its_newline() {
        let (key, passphrase) = (file_with_mode(0o600, "KEY"), file_with_mode(0o600, " open sesame \n"));
        let both = KeySource {
            origin: KeyOrigin::File(key.path().to_owned()),
            passphrase_file: Some(passphrase.path().to_owned()),
        };
        assert_eq!(both.read("main").unwrap().passphrase.unwrap().expose_secret(), " open sesame ");
        assert!(!format!("{:?}", both.read("main").unwrap()).contains("sesame"));
    }

    #[test]
    fn a_command_answers_fails_or_is_cut_off() {
        let read = |command: &str| {
            let read = run_command(command, Duration::from_millis(500));
            read.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        assert_eq!(read("printf 'KEY\\n'"), Ok("KEY\n".to_owned()));
        assert!(read("echo SECRET; exit 3").unwrap_err().contains("exit status: 3"));
        assert!(!read("echo SECRET; exit 3").unwrap_err().contains("SECRET"));
        assert!(read("exec sleep 20").unwrap_err().contains("did not answer"));
        assert!(read("head -c 100000 /dev/zero | tr '\\0' x").unwrap_err().contains("longer than"));
    }

    #[test]
    fn an_unset_variable_is_named() {
        assert!(read_environment("PGKEEP_KEY", None).unwrap_err().contains("PGKEEP_KEY"));
        assert!(read_environment("PGKEEP_KEY", Some("".into())).is_err());
        assert_eq!(*read_environment("PGKEEP_KEY", Some("text".into())).unwrap(), "text");
    }
}
