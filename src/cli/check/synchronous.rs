//! Whether commits wait for us, as they are meant to. Pure.
//!
//! `synchronous_standby_names` says who may be waited for, `pg_stat_replication` who is, `synchronous_commit` for what. Who
//! streams from a standby is never waited for, whatever the names say.

use super::judge::{Item, Ours, Server, Sql};

const ITEM: &str = "synchronous";
/// What frees commits that wait for an archive that does not answer.
const SWITCH_OFF: &str =
    "or let commits go on without it: ALTER SYSTEM SET synchronous_standby_names = ''; SELECT pg_reload_conf();";

/// How `synchronous_standby_names` means us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    No,
    Star,
    ByName,
}

/// What the setting asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    named: Named,
    /// `ANY n (...)` of more than n: a commit may return without us.
    is_quorum: bool,
}

/// Reads `a, "b c"`, `2 (a, b)`, `FIRST 2 (a, b)`, `ANY 2 (a, *)`. Names are compared as the server does: without case.
fn wanted(setting: &str, application_name: &str) -> Wanted {
    let (head, list) = match (setting.find('('), setting.rfind(')')) {
        (Some(from), Some(to)) if from < to => {
            (setting.get(..from).unwrap_or_default(), setting.get(from + 1..to).unwrap_or_default())
        }
        _ => ("", setting),
    };
    let (mut named, mut names) = (Named::No, 0_usize);
    let mut name = String::new();
    let mut quoted = false; // inside quotes
    let mut was_quoted = false;
    for letter in list.chars().chain([',']) {
        match letter {
            '"' => (quoted, was_quoted) = (!quoted, true),
            ',' if !quoted => {
                let one = if was_quoted { name.as_str() } else { name.trim() };
                if one == "*" && !was_quoted {
                    named = if named == Named::No { Named::Star } else { named };
                    names = usize::MAX; // who that is, is not known
                } else if !one.is_empty() {
                    names = names.saturating_add(1);
                    if one.eq_ignore_ascii_case(application_name) {
                        named = Named::ByName;
                    }
                }
                (name, was_quoted) = (String::new(), false);
            }
            letter if quoted || !letter.is_whitespace() => name.push(letter),
            _ => {}
        }
    }
    let mut words = head.split_whitespace();
    let any = words.next().is_some_and(|word| word.eq_ignore_ascii_case("any"));
    let needed = words.next().and_then(|number| number.parse::<usize>().ok()).unwrap_or(1);
    Wanted { named, is_quorum: any && needed < names }
}

/// See the module.
pub(super) fn judge(server: &Server, ours: &Ours) -> Item {
    let names = server.setting("synchronous_standby_names").unwrap_or_default();
    let wanted = wanted(names, &ours.application_name);
    match (ours.synchronous, wanted.named) {
        (false, Named::No) => Item::ok(ITEM, "commits do not wait for pgkeep"),
        (false, how) => by_accident(how, &ours.application_name),
        (true, _) if server.sql.as_ref().is_some_and(|sql| sql.standby) => Item::not_ok(
            ITEM,
            "synchronous = true, but the server is a standby: no commit ever waits for who streams from a standby",
            "let conninfo lead to the primary (several hosts with target_session_attrs=read-write), or set synchronous = false",
        ),
        (true, Named::No) => Item::warn(
            ITEM,
            "synchronous = true, but synchronous_standby_names does not name us: no commit waits",
            format!(
                "ALTER SYSTEM SET synchronous_standby_names = '\"{}\"'; SELECT pg_reload_conf();",
                ours.application_name
            ),
        ),
        (true, _) => meant(server, ours, wanted),
    }
}

fn by_accident(how: Named, us: &str) -> Item {
    let how = match how {
        Named::Star => "the `*` in synchronous_standby_names means pgkeep too".to_owned(),
        _ => format!("synchronous_standby_names names {us}"),
    };
    Item::not_ok(
        ITEM,
        format!("{how}, and this cluster has synchronous = false: commits may wait for the archive's max_delay"),
        "set synchronous = true if that is meant; else name the standbys in synchronous_standby_names, without `*`",
    )
}

/// We are named, and mean to be.
fn meant(server: &Server, ours: &Ours, wanted: Wanted) -> Item {
    let level = server.setting("synchronous_commit").unwrap_or("on");
    if matches!(level, "off" | "local") {
        return Item::warn(
            ITEM,
            format!(
                "synchronous = true, but synchronous_commit is {level}: no commit waits unless its session says so"
            ),
            "ALTER SYSTEM SET synchronous_commit = on; SELECT pg_reload_conf();",
        );
    }
    let waits = match level {
        "remote_apply" => {
            "commits wait until they are archived (remote_apply: pgkeep reports durable as applied)".to_owned()
        }
        level => format!("commits wait until they are archived (synchronous_commit = {level})"),
    };
    match &server.sql {
        Some(sql) => counted(sql, ours, wanted, waits),
        None => Item::ok(ITEM, format!("{waits}; whether the server counts pgkeep now cannot be seen without SQL")),
    }
}

/// What the server makes of it now.
fn counted(sql: &Sql, ours: &Ours, wanted: Wanted, waits: String) -> Item {
    let us = &ours.application_name;
    let Some(counted) = &sql.counted else {
        return Item::not_ok(
            ITEM,
            format!("commits are to wait for {us}, and nobody of that name streams: they hang"),
            format!("start `pgkeep run`; {SWITCH_OFF}"),
        );
    };
    match (counted.sync_state.as_deref(), counted.state.as_deref()) {
        (Some("sync"), _) if sql.not_waiting > 0 => Item::warn(
            ITEM,
            format!(
                "{waits}, but for those of {} roles or databases that set synchronous_commit to off or local",
                sql.not_waiting
            ),
            "SELECT * FROM pg_db_role_setting; is that meant?",
        ),
        (Some("sync"), _) => Item::ok(ITEM, format!("{waits}; the server counts {us} as sync")),
        (Some("quorum"), _) if wanted.is_quorum => Item::warn(
            ITEM,
            format!("{us} is one of a quorum: a commit may return when others have it and the archive does not"),
            "FIRST, with a number that includes us, makes every commit wait for the archive",
        ),
        (Some("quorum"), _) => Item::ok(ITEM, format!("{waits}; the server needs all of the quorum that {us} is in")),
        (Some("potential"), _) => Item::warn(
            ITEM,
            format!("{us} is only potential: commits wait for the standbys named before it, and not for the archive"),
            format!("name {us} among the first, such as 'FIRST 2 (standby, {us})'"),
        ),
        (Some("async"), Some("streaming")) => Item::warn(
            ITEM,
            format!("{us} is named and streams, but the server does not count it yet: commits wait until it does"),
            "it is counted when it has confirmed something: ask again in a moment; `pgkeep run`'s log says what keeps it",
        ),
        (Some("async"), state) => Item::warn(
            ITEM,
            format!(
                "{us} is not counted while it is in state {}: commits wait until it has caught up",
                state.unwrap_or("unknown")
            ),
            "`pgkeep list` shows how far behind it is",
        ),
        _ => Item::ok(ITEM, format!("{waits}; whether the server counts {us} now this role may not see")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge::Counted;
    use super::super::judge::State;
    use super::super::judge::tests::{good, ours};
    use super::*;

    #[test]
    fn standby_names_are_read_as_the_server_reads_them() {
        let cases = [
            ("", Named::No, false),
            ("*", Named::Star, false),
            ("a, *", Named::Star, false),
            ("*, PgKeep", Named::ByName, false),
            ("\"pgkeep\"", Named::ByName, false),
            ("FIRST 2 (a, pgkeep)", Named::ByName, false),
            ("ANY 1 (*)", Named::Star, true),
            ("any 1 (a, pgkeep)", Named::ByName, true),
            ("ANY 2 (a, pgkeep)", Named::ByName, false),
            ("1 (a, b)", Named::No, false),
            ("\"*\"", Named::No, false),        // a name, not the star
            ("\"a,pgkeep\"", Named::No, false), // one name
            ("pgkeep2, my_pgkeep", Named::No, false),
        ];
        for (setting, named, is_quorum) in cases {
            assert_eq!(wanted(setting, "pgkeep"), Wanted { named, is_quorum }, "{setting}");
        }
    }

    #[test]
    fn pitfall_03_a_star_that_makes_us_synchronous_by_accident_is_seen() {
        for names in ["*", "ANY 1 (s1, PGKEEP)"] {
            let mut facts = good();
            facts.settings.insert("synchronous_standby_names".to_owned(), names.to_owned());
            assert_eq!(judge(&facts, &ours()).state, State::NotOk);
        }
    }

    fn judged(names: &str, level: &str, change: impl FnOnce(&mut Sql)) -> Item {
        let mut facts = good();
        facts.settings.insert("synchronous_standby_names".to_owned(), names.to_owned());
        facts.settings.insert("synchronous_commit".to_owned(), level.to_owned());
        let sql = facts.sql.as_mut().unwrap();
        sql.counted = Some(Counted { state: Some("streaming".to_owned()), sync_state: Some("sync".to_owned()) });
        change(sql);
        judge(&facts, &Ours { synchronous: true, ..ours() })
    }

    #[test]
    fn pitfall_04_remote_apply_is_answered_where_commits_are_meant_to_wait() {
        let judge = |names: &str, level: &str| judged(names, level, |_| {});
        assert_eq!(judge("pgkeep", "remote_apply").state, State::Ok);
        assert!(judge("pgkeep", "remote_apply").found.contains("applied"));
        assert_eq!(judge("pgkeep", "local").state, State::Warn, "nobody waits");
        assert_eq!(judge("other", "on").state, State::Warn, "nobody waits for us");
    }

    /// The configuration alone does not say whether the server waits.
    #[test]
    fn whether_the_server_waits_is_what_it_says_itself() {
        let state = |sync: &str, streams: &str| {
            let counted = Counted { state: Some(streams.to_owned()), sync_state: Some(sync.to_owned()) };
            judged("pgkeep", "on", |sql| sql.counted = Some(counted)).state
        };
        assert_eq!(state("sync", "streaming"), State::Ok);
        assert_eq!(["potential", "async"].map(|sync| state(sync, "streaming")), [State::Warn; 2]);
        assert_eq!(state("async", "catchup"), State::Warn);
        let quorum = Counted { sync_state: Some("quorum".to_owned()), state: None };
        let of = |names| judged(names, "on", |sql| sql.counted = Some(quorum.clone())).state;
        assert_eq!((of("ANY 1 (a, pgkeep)"), of("ANY 2 (a, pgkeep)")), (State::Warn, State::Ok));
        let hangs = judged("pgkeep", "on", |sql| sql.counted = None);
        assert!(hangs.state == State::NotOk && hangs.todo.unwrap().contains("synchronous_standby_names = ''"));
        let blind = judged("pgkeep", "on", |sql| sql.counted = Some(Counted::default()));
        assert!(blind.state == State::Ok && blind.found.contains("may not see"));
        assert_eq!(judged("pgkeep", "on", |sql| sql.not_waiting = 2).state, State::Warn);
        let cascading = judged("pgkeep", "on", |sql| sql.standby = true);
        assert!(cascading.state == State::NotOk && cascading.found.contains("standby"), "{cascading:?}");
    }
}
