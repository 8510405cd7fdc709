use std::os::unix::fs::PermissionsExt as _;

use proptest::collection::vec;
use proptest::prelude::*;
use secrecy::ExposeSecret as _;

use super::*;

fn environment(variables: &[(&str, &str)], home: Option<&Path>) -> Environment {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Environment::new(variables, home.map(Path::to_owned), Some("os_user".to_owned()))
}

fn resolve(text: &str) -> Result<ConnInfo, PgError> {
    ConnInfo::resolve(text, &environment(&[], None))
}

fn settings(text: &str) -> Vec<(String, String)> {
    text::parse(text).unwrap().into_iter().collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(keyword, value)| ((*keyword).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn keywords_and_values_as_libpq_reads_them() {
    for (text, want) in [
        ("", &[][..]),
        ("  \t\n", &[]),
        ("host=a user=b", &[("host", "a"), ("user", "b")]),
        ("host = a  user\t=\nb", &[("host", "a"), ("user", "b")]),
        ("password='with space'", &[("password", "with space")]),
        (r"password='it\'s \\ here'", &[("password", r"it's \ here")]),
        (r"password=a\ b\'c", &[("password", "a b'c")]),
        (r"password=end\", &[("password", "end")]),
        ("password='' user=u", &[("password", ""), ("user", "u")]),
        ("password= user=u", &[("password", "user=u")]), // white space after the equals sign is skipped
        ("user=a user=b", &[("user", "b")]),
        ("password=''user=x", &[("password", ""), ("user", "x")]),
        ("password=ä'ö", &[("password", "ä'ö")]),
    ] {
        assert_eq!(settings(text), pairs(want), "{text:?}");
    }
}

#[test]
fn uris_as_libpq_reads_them() {
    for (text, want) in [
        ("postgresql://", &[][..]),
        ("postgres://localhost", &[("host", "localhost")]),
        ("postgresql://localhost:5433/db", &[("dbname", "db"), ("host", "localhost"), ("port", "5433")]),
        ("postgresql://u:p@h/", &[("host", "h"), ("password", "p"), ("user", "u")]),
        ("postgresql://u%40x:p%3A%2F%25@h", &[("host", "h"), ("password", "p:/%"), ("user", "u@x")]),
        ("postgresql://u:a:b@h", &[("host", "h"), ("password", "a:b"), ("user", "u")]),
        ("postgresql:///db?host=/tmp&port=1", &[("dbname", "db"), ("host", "/tmp"), ("port", "1")]),
        ("postgresql://%2Fvar%2Frun/db", &[("dbname", "db"), ("host", "/var/run")]),
        ("postgresql://a:1,b:2,c/db", &[("dbname", "db"), ("host", "a,b,c"), ("port", "1,2,")]),
        ("postgresql://[::1]:5433,[2001:db8::1]", &[("host", "::1,2001:db8::1"), ("port", "5433,")]),
        ("postgresql://u@?application_name=a%20b", &[("application_name", "a b"), ("user", "u")]),
        ("postgresql://h?ssl=true", &[("host", "h"), ("sslmode", "require")]),
        ("postgresql://h/db@x", &[("dbname", "db@x"), ("host", "h")]),
    ] {
        assert_eq!(settings(text), pairs(want), "{text:?}");
    }
}

#[test]
fn mistakes_get_a_sentence() {
    for (text, part) in [
        ("host", "\"=\" is missing"),
        ("user=a hunter2", "\"=\" is missing"),
        ("hots=a", "hots"),
        ("password='abc", "does not end"),
        ("port=0", "1 to 65535"),
        ("port=65536", "1 to 65535"),
        ("host=a,b port=1,2,3", "3 ports for 2 hosts"),
        ("host=a,b hostaddr=1.1.1.1", "2 hosts"),
        ("hostaddr=localhost", "not an IP address"),
        ("sslmode=on", "verify-full"),
        ("sslmode=prefer sslrootcert=system", "verify-full"),
        ("sslmode=prefer sslnegotiation=direct", "sslmode=require"),
        ("sslcrl=/x", "not supported"),
        ("requirepeer=postgres", "not supported"),
        ("gssencmode=require", "not supported"),
        ("replication=true", "leave out"),
        ("target_session_attrs=master", "primary"),
        ("channel_binding=yes", "require"),
        ("require_auth=md5,!none", "every method"),
        ("require_auth=kerberos", "kerberos"),
        ("connect_timeout=soon", "connect_timeout"),
        ("ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "no version"),
        ("service=nowhere", "nowhere"),
        ("postgresql://h/?hots=1", "hots"),
        ("postgresql://h/?port", "keyword=value"),
        ("postgresql://h/?port=1=2", "%3D"),
        ("postgresql://a%2", "two hex digits"),
        ("postgresql://a%zz", "two hex digits"),
        ("postgresql://a%00b", "%00"),
        ("postgresql://a%FF", "UTF-8"),
        ("postgresql://[::1", "`]`"),
        ("postgresql://[]:1", "empty"),
        ("postgresql://[::1]x", "only a port"),
    ] {
        let error = resolve(text).expect_err(text).to_string();
        assert!(error.contains(part), "{text:?} gave {error:?}");
        assert!(!error.contains("hunter2"), "{error} shows what may be a password");
    }
}

#[test]
fn secrets_stay_inside() {
    let info = resolve("host=h user=u password=hunter2").unwrap();
    assert!(!format!("{info:?} {}", info.describe()).contains("hunter2"));
    let error = resolve("postgresql://u:hunter2%@h").unwrap_err().to_string();
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn several_hosts() {
    let tcp = |name: &str, address: Option<&str>, port| Host {
        place: Place::Tcp { name: name.to_owned(), address: address.map(|text| text.parse().unwrap()) },
        port,
    };
    let unix = |directory: &str, port| Host { place: Place::Unix(directory.to_owned()), port };
    for (text, want) in [
        ("host=a,b", vec![tcp("a", None, 5432), tcp("b", None, 5432)]),
        ("host=a,b port=7", vec![tcp("a", None, 7), tcp("b", None, 7)]),
        ("host=a,b port=7,", vec![tcp("a", None, 7), tcp("b", None, 5432)]),
        ("host=/run/x,b port=1,2", vec![unix("/run/x", 1), tcp("b", None, 2)]),
        ("host=@abstract", vec![unix("@abstract", 5432)]),
        ("hostaddr=127.0.0.1,::1", vec![tcp("127.0.0.1", Some("127.0.0.1"), 5432), tcp("::1", Some("::1"), 5432)]),
        ("host=a hostaddr=127.0.0.1", vec![tcp("a", Some("127.0.0.1"), 5432)]),
    ] {
        assert_eq!(resolve(text).unwrap().hosts, want, "{text:?}");
    }
    assert!(matches!(resolve("").unwrap().hosts.as_slice(), [Host { place: Place::Unix(_), port: 5432 }]));
}

#[test]
fn variables_and_services_fill_in_and_never_override() {
    let home = tempfile::tempdir().unwrap();
    let service = home.path().join(".pg_service.conf");
    std::fs::write(
        &service,
        "# mine\n[other]\nhost=wrong\n\n[main]\nhost=from_service\nport=1111\n  dbname=shop \n[main]\nuser=second\n",
    )
    .unwrap();
    let variables =
        [("PGSERVICE", "main"), ("PGHOST", "from_env"), ("PGUSER", "env_user"), ("PGAPPNAME", "app"), ("PGPORT", "2")];
    let info = ConnInfo::resolve("port=3333", &environment(&variables, Some(home.path()))).unwrap();
    assert_eq!(info.describe(), "from_service:3333 as env_user");
    assert_eq!((info.database(), info.application_name()), ("shop", Some("app")));

    let info = ConnInfo::resolve("", &environment(&variables[1..], None)).unwrap();
    assert_eq!(info.describe(), "from_env:2 as env_user");
    let info = ConnInfo::resolve("host=x user=''", &environment(&[], None)).unwrap();
    assert_eq!((info.user(), info.database()), ("os_user", "os_user"));

    std::fs::write(&service, "[main]\nhost=a\nnonsense\n").unwrap();
    let error = ConnInfo::resolve("service=main", &environment(&[], Some(home.path()))).unwrap_err().to_string();
    assert!(error.contains("line 3"), "{error}");
}

#[test]
fn tls_settings() {
    for (text, mode) in [
        ("", SslMode::Prefer),
        ("requiressl=1", SslMode::Require),
        ("sslrootcert=system", SslMode::VerifyFull),
        ("sslmode=verify-ca", SslMode::VerifyCa),
    ] {
        assert_eq!(resolve(text).unwrap().tls.mode, mode, "{text:?}");
    }
    let none = resolve("sslcertmode=disable sslcert=/c sslkey=/k").unwrap();
    assert!(none.tls.cert.is_none());
}

#[test]
fn require_auth_with_and_without_negation() {
    let methods = |text: &str| resolve(&format!("require_auth={text}")).unwrap().require_auth.unwrap();
    assert_eq!(methods("scram-sha-256,none"), [AuthMethod::Scram, AuthMethod::None]);
    assert!(!methods("!password,!md5").contains(&AuthMethod::Md5));
    assert!(methods("!password,!md5").contains(&AuthMethod::Scram));
}

fn found(lines: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
    passfile::find(lines, host, port, database, user).map(|password| password.expose_secret().to_owned())
}

#[test]
fn the_first_line_of_the_password_file_that_fits() {
    let lines = "#h:1:d:u:comment\nh:1:d:u:first\nh:1:d:u:second\n*:2:*:u:any host\n\
                 \\:\\:1:5432:*:*:six\nwin:1:d:u:crlf\r\nh\\\\x:*:*:*:a\\:b\\\\c:rest\nshort:1\n";
    for (host, port, database, user, want) in [
        ("h", 1, "d", "u", Some("first")),
        ("h", 1, "d", "x", None),
        ("h", 3, "d", "u", None),
        ("else", 2, "whatever", "u", Some("any host")),
        ("::1", 5432, "d", "u", Some("six")),
        ("win", 1, "d", "u", Some("crlf")),
        ("h\\x", 9, "d", "u", Some("a:b\\c")),
        ("short", 1, "d", "u", None),
        ("hh", 1, "d", "u", None),
        ("", 1, "d", "u", None),
    ] {
        assert_eq!(found(lines, host, port, database, user).as_deref(), want, "{host}:{port}:{database}:{user}");
    }
}

#[test]
fn a_password_file_that_others_can_read_is_not_used() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(".pgpass");
    std::fs::write(&path, "h:5432:replication:u:for replication\nh:5432:u:u:for sql\nlocalhost:*:*:u:socket\n")
        .unwrap();
    let info = ConnInfo::resolve("host=h user=u", &environment(&[], Some(home.path()))).unwrap();
    let password = |info: &ConnInfo, purpose| {
        info.password(&info.hosts[0], purpose).0.map(|password| password.expose_secret().to_owned())
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(password(&info, PasswordFor::Sql), None);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(password(&info, PasswordFor::Sql).as_deref(), Some("for sql"));
    assert_eq!(password(&info, PasswordFor::Replication).as_deref(), Some("for replication"));
    let socket = ConnInfo::resolve("host=/tmp user=u", &environment(&[], Some(home.path()))).unwrap();
    assert_eq!(password(&socket, PasswordFor::Sql).as_deref(), Some("socket"));
    let named = ConnInfo::resolve("host=h user=u password=direct", &environment(&[], Some(home.path()))).unwrap();
    assert_eq!(password(&named, PasswordFor::Sql).as_deref(), Some("direct"));
}

/// A value as `pg_basebackup -R` would quote it.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn percent(value: &str) -> String {
    value.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

proptest! {
    #[test]
    fn any_value_survives_quoting(values in vec(any::<String>(), 3), blanks in vec("[ \t\n]{0,3}", 3)) {
        let text = format!(
            "user{}={}{} password={} {}dbname = {}",
            blanks[0], blanks[1], quoted(&values[0]), quoted(&values[1]), blanks[2], quoted(&values[2])
        );
        let want = [("dbname", &*values[2]), ("password", &*values[1]), ("user", &*values[0])];
        prop_assert_eq!(settings(&text), pairs(&want));
    }

    #[test]
    fn any_value_survives_a_uri(values in vec("[^\0]{1,12}", 3)) {
        let text = format!("postgresql://{}:{}@h/?options={}", percent(&values[0]), percent(&values[1]), percent(&values[2]));
        let want = [("host", "h"), ("options", &*values[2]), ("password", &*values[1]), ("user", &*values[0])];
        prop_assert_eq!(settings(&text), pairs(&want));
    }

    #[test]
    fn no_text_panics(text in "(postgres://|)[ -~]{0,60}", wild in any::<String>()) {
        let _ = resolve(&text);
        let _ = resolve(&wild);
        let _ = found(&wild, "h", 1, "d", "u");
    }

    #[test]
    fn any_password_survives_the_file(host in "[^\n\r\0]{1,8}", password in "[^\n\r\0]{1,12}") {
        let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
        let line = format!("{}:5432:d:u:{}\n", escape(&host), escape(&password));
        // A line that begins with # is a comment, and * fits everything.
        prop_assume!(!host.starts_with('#') && host != "*");
        prop_assert_eq!(found(&line, &host, 5432, "d", "u"), Some(password));
    }
}
