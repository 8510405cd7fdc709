//! Restoring some databases alone: which files that leaves out.
//!
//! What always holds: shared catalogs, the databases that every cluster has, and everything that is no relation's file are
//! restored. A relation of another database becomes a file of its size without content: recovery finds it, replays what
//! the WAL says into it, and nothing of it is read from the packs. Such a server is a place to dump the wanted databases
//! from, never one to go on with.

use std::collections::{BTreeMap, BTreeSet};

use super::RestoreError;
use super::sources::Sources;
use super::table::Table;
use crate::catalog::records::Manifest;
use crate::catalog::relations::Names;
use crate::catalog::table::FileKind;
use crate::types::Lsn;
use crate::wal::Touched;

/// The first OID that `initdb` does not give: databases below are in every cluster, templates among them.
const FIRST_NORMAL_OID: u32 = 16384;

/// Settings that recovery needs where files have no content. A page that is not there is no error then; a worker that
/// cannot connect to an empty database would try again for ever.
pub const SETTINGS: &str = "ignore_invalid_pages = 'on'\nautovacuum = 'off'\n";

/// Which databases are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Only {
    databases: BTreeSet<u32>,
    /// Bytes of the files that are restored.
    pub bytes: u64,
    /// What a person should know.
    pub note: String,
}

impl Only {
    /// Whether a file of the table, by its path there, is restored with its content.
    pub fn wants(&self, path: &str) -> bool {
        wants(&self.databases, path)
    }
}

fn wants(databases: &BTreeSet<u32>, path: &str) -> bool {
    match relation_of(path) {
        Some(oid) => oid < FIRST_NORMAL_OID || databases.contains(&oid),
        None => true,
    }
}

/// Finds the databases that were asked for, by name or OID, among those that the base backup has. Names are those of the
/// moment at which the backup was complete. Reads the tables, and nothing of the packs.
///
/// # Errors
/// [`RestoreError::Database`]; what the repository says.
pub async fn find(
    sources: &Sources,
    manifest: &Manifest,
    names: &Names,
    asked: &[String],
) -> Result<Only, RestoreError> {
    let (mut there, mut relations, mut rest) = (BTreeSet::new(), BTreeMap::new(), 0);
    let mut table = Table::new(sources, manifest);
    while let Some(entry) = table.next().await? {
        there.extend(database_of(&entry.path));
        if entry.kind == FileKind::File {
            match relation_of(&entry.path) {
                Some(oid) => *relations.entry(oid).or_insert(0) += entry.size,
                None => rest += entry.size,
            }
        }
    }
    let known = known(&there, names, manifest.backup.stop);
    let databases = choose(&known, asked).map_err(|(given, reason)| RestoreError::Database {
        given,
        reason,
        label: manifest.backup.label,
        known: known.iter().map(|(oid, name)| describe(*oid, name.as_deref())).collect::<Vec<_>>().join(", "),
    })?;
    let wanted = relations.iter().filter(|(oid, _)| **oid < FIRST_NORMAL_OID || databases.contains(oid));
    let bytes = rest + wanted.map(|(_, bytes)| bytes).sum::<u64>();
    let empty = known.iter().filter(|(oid, _)| **oid >= FIRST_NORMAL_OID && !databases.contains(oid));
    let empty: Vec<String> = empty.map(|(oid, name)| describe(*oid, name.as_deref())).collect();
    let wanted: Vec<String> =
        databases.iter().map(|oid| describe(*oid, known.get(oid).and_then(Option::as_deref))).collect();
    let left_out = if empty.is_empty() { "no other".to_owned() } else { empty.join(", ") };
    let note = format!(
        "only database {} is restored, and what every cluster has; without content: {left_out}. The server is good for \
         dumping {} with pg_dump, and for nothing else: never go on with it, and do not connect to the others",
        wanted.join(", "),
        if wanted.len() == 1 { "that database" } else { "those databases" },
    );
    Ok(Only { databases, bytes, note })
}

/// The databases that a backup has, with their names as far as they were noted.
fn known(there: &BTreeSet<u32>, names: &Names, at: Lsn) -> BTreeMap<u32, Option<String>> {
    let name = |oid: u32| names.of(&Touched::Database(oid), at).map(|called| called.name.clone());
    there.iter().map(|oid| (*oid, name(*oid))).collect()
}

fn describe(oid: u32, name: Option<&str>) -> String {
    name.map_or_else(|| format!("{oid} (its name was not noted)"), |name| format!("{name} ({oid})"))
}

/// The OIDs of what was asked for, by name first; or the one that cannot be found, and why.
fn choose(known: &BTreeMap<u32, Option<String>>, asked: &[String]) -> Result<BTreeSet<u32>, (String, &'static str)> {
    let mut chosen = BTreeSet::new();
    for asked in asked {
        let named: Vec<u32> =
            known.iter().filter(|(_, name)| name.as_ref() == Some(asked)).map(|(oid, _)| *oid).collect();
        match named.as_slice() {
            [oid] => chosen.insert(*oid),
            [] => match asked.parse::<u32>().ok().filter(|oid| known.contains_key(oid)) {
                Some(oid) => chosen.insert(oid),
                None => return Err((asked.clone(), "there is no such database in it")),
            },
            _ => return Err((asked.clone(), "several of its databases were called so; say which by its OID")),
        };
    }
    Ok(chosen)
}

/// The database in whose directory a path lies: `base/<oid>/…` or `pg_tblspc/<oid>/PG_…/<oid>/…`.
fn database_of(path: &str) -> Option<u32> {
    let mut parts = path.split('/');
    let oid = match parts.next()? {
        "base" => parts.next()?,
        "pg_tblspc" => parts.nth(2)?,
        _ => return None,
    };
    oid.parse().ok()
}

/// The database that a file belongs to, if it is a relation's: `<number>[_fsm|_vm][.<segment>]`. Not an `_init` fork, which
/// is a page that the server copies.
fn relation_of(path: &str) -> Option<u32> {
    let database = database_of(path)?;
    let parts = path.split('/').count();
    if parts != if path.starts_with("base/") { 3 } else { 5 } {
        return None;
    }
    let (_, file) = path.rsplit_once('/')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let name = match file.split_once('.') {
        Some((name, segment)) if is_number(segment) => name,
        Some(_) => return None,
        None => file,
    };
    let number = name.strip_suffix("_fsm").or_else(|| name.strip_suffix("_vm")).unwrap_or(name);
    is_number(number).then_some(database)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_relations_of_other_databases_are_left_out() {
        let databases = BTreeSet::from([16400]);
        let cases = [
            ("base/16400/2619", true),
            ("base/16401/2619", false),
            ("base/16401/16500.1", false),
            ("base/16401/16500_fsm", false),
            ("base/16401/16500_vm.2", false),
            ("base/16401/16500_init", true),
            ("base/16401/PG_VERSION", true),
            ("base/16401/pg_filenode.map", true),
            ("base/16401/16500.bak", true),
            ("base/16401/mine/16500", true),
            ("base/1/2619", true),
            ("base/16401", true),
            ("pg_tblspc/16390/PG_15_202209061/16401/16500", false),
            ("pg_tblspc/16390/PG_15_202209061/16400/16500", true),
            ("pg_tblspc/16390/PG_15_202209061/PG_VERSION", true),
            ("global/1262", true),
            ("log/16401/16500", true),
        ];
        for (path, want) in cases {
            assert_eq!(wants(&databases, path), want, "{path}");
        }
    }

    #[test]
    fn databases_are_chosen_by_name_or_oid() {
        let name = |name: &str| Some(name.to_owned());
        let known = BTreeMap::from([
            (1, name("template1")),
            (16400, name("shop")),
            (16401, None),
            (16402, name("twice")),
            (16403, name("twice")),
            (16404, name("16400")),
        ]);
        let chosen = |asked: &[&str]| {
            let asked: Vec<String> = asked.iter().map(|asked| (*asked).to_owned()).collect();
            choose(&known, &asked).map(|oids| oids.into_iter().collect::<Vec<_>>()).map_err(|(given, _)| given)
        };
        assert_eq!(chosen(&["shop", "16401"]), Ok(vec![16400, 16401]));
        assert_eq!(chosen(&["16400"]), Ok(vec![16404]), "a name comes first");
        assert_eq!(chosen(&["shop", "other"]), Err("other".to_owned()));
        assert_eq!(chosen(&["twice"]), Err("twice".to_owned()));
        assert_eq!(chosen(&["16999"]), Err("16999".to_owned()));
    }
}
