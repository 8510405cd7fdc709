//! Names of relations, as they were at some moments. WAL knows files by numbers alone.
//!
//! What always holds: a name is that of a moment, and nobody guesses beyond it. A number that no picture has stays a number;
//! one that was dropped after the picture and before the transaction in question has no name any more ([`Names::of`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::layout::{ClusterObject, Name, Object, folder};
use super::records::Record;
use super::repository::Repository;
use crate::store::{Created, ObjectMeta, list_all};
use crate::types::{BackupLabel, ClusterId, Lsn};
use crate::wal::{RelFile, Touched};

/// Pictures that are read: the newest ones.
const PICTURES_MAX: usize = 64;

/// A picture of the names of all relations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationNames {
    /// When, by our clock: its name.
    pub label: BackupLabel,
    /// The server's WAL position before the first catalog was read.
    pub lsn: Lsn,
    /// By OID.
    pub databases: Vec<DatabaseNames>,
}

impl Record for RelationNames {
    const NAME: &'static str = "relations";
}

/// The names in one database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseNames {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// OID, number of the file (0: none), OID of the tablespace, schema, name, `relkind`.
    pub relations: Vec<(u32, u32, u32, String, String, char)>,
    /// Why not all of them are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

/// What something is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Called {
    /// The database; empty for a relation of all databases.
    pub database: String,
    /// The schema; empty for a database.
    pub schema: String,
    /// The name; of a TOAST table its owner's.
    pub name: String,
    /// `relkind`; `D` for a database.
    pub kind: char,
}

/// Names from several pictures.
#[derive(Debug, Default)]
pub struct Names {
    /// By position.
    pictures: BTreeMap<Lsn, HashMap<Touched, Called>>,
    dropped: HashMap<Touched, Vec<Lsn>>,
}

impl Names {
    /// Adds a picture.
    pub fn add(&mut self, picture: &RelationNames) {
        let names = self.pictures.entry(picture.lsn).or_default();
        for database in &picture.databases {
            let called = |schema: &str, name: &str, kind| Called {
                database: database.name.clone(),
                schema: schema.to_owned(),
                name: name.to_owned(),
                kind,
            };
            names.insert(Touched::Database(database.oid), called("", &database.name, 'D'));
            for (oid, file, tablespace, schema, name, kind) in &database.relations {
                let relation = Touched::Relation { database: database.oid, oid: *oid };
                names.insert(relation, called(schema, name, *kind));
                if *file != 0 {
                    let file = RelFile { tablespace: *tablespace, database: database.oid, number: *file };
                    names.insert(Touched::File(file), called(schema, name, *kind));
                }
            }
        }
    }

    /// Something went with the commit at `at`: a picture from before says nothing of what comes after.
    pub fn dropped(&mut self, what: Touched, at: Lsn) {
        self.dropped.entry(what).or_default().push(at);
    }

    /// Whether there is any picture.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// What `what` was called at `at`, by the last picture before that has it, else by the first one after; `None` where it
    /// was dropped in between.
    pub fn of(&self, what: &Touched, at: Lsn) -> Option<&Called> {
        let before = self.pictures.range(..=at).rev();
        let after = self.pictures.range(at..);
        let (taken, called) = before.chain(after).find_map(|(lsn, names)| Some((*lsn, names.get(what)?)))?;
        let (from, to) = (taken.min(at), taken.max(at));
        let gone = |lsn: &Lsn| from < *lsn && *lsn < to;
        (!self.dropped.get(what).is_some_and(|lsns| lsns.iter().any(gone))).then_some(called)
    }

    /// Everything that was ever called so: `name`, `schema.name` or `database.schema.name`.
    pub fn named(&self, text: &str) -> HashSet<Touched> {
        let fits = |called: &Called| {
            let Called { database, schema, name, .. } = called;
            text == name || text == format!("{schema}.{name}") || text == format!("{database}.{schema}.{name}")
        };
        let all = self.pictures.values().flatten();
        all.filter(|(_, called)| fits(called)).map(|(what, _)| *what).collect()
    }
}

impl Repository {
    /// Keeps a picture of names.
    ///
    /// # Errors
    /// [`CatalogError::Taken`] where another one was taken in the same second; what the store says.
    pub async fn put_relations(&self, cluster: &ClusterId, names: &RelationNames) -> Result<(), CatalogError> {
        self.put_record(cluster, ClusterObject::Relations(names.label), names).await.map(|_| ())
    }

    /// When names were noted.
    ///
    /// # Errors
    /// What the store says.
    pub async fn relation_labels(&self, cluster: &ClusterId) -> Result<BTreeSet<BackupLabel>, CatalogError> {
        let listed = list_all(self.store().as_ref(), &folder::relations(cluster)).await;
        let listed = listed.map_err(|source| self.in_store(source))?;
        let label = |object: &ObjectMeta| match Name::parse(object.key.as_str()).ok()?.object {
            Object::Of(_, ClusterObject::Relations(label)) => Some(label),
            _ => None,
        };
        Ok(listed.iter().filter_map(label).collect())
    }

    /// Copies a picture of names; `false` where it is here.
    ///
    /// # Errors
    /// [`CatalogError::Taken`]; damage that names the object; what the stores say.
    pub async fn copy_relations(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        label: BackupLabel,
    ) -> Result<bool, CatalogError> {
        let object = ClusterObject::Relations(label);
        let names: RelationNames = from.get_record(cluster, object.clone()).await?;
        Ok(self.put_record(cluster, object, &names).await? == Created::New)
    }

    /// The newest pictures of names. One that does not open is passed over, and logged.
    ///
    /// # Errors
    /// What the store says.
    pub async fn relation_names(&self, cluster: &ClusterId) -> Result<Names, CatalogError> {
        let labels = self.relation_labels(cluster).await?;
        let mut names = Names::default();
        for label in labels.into_iter().rev().take(PICTURES_MAX) {
            match self.get_record::<RelationNames>(cluster, ClusterObject::Relations(label)).await {
                Ok(picture) => names.add(&picture),
                Err(error) if error.is_damage() || error.is_not_found() => {
                    tracing::warn!(%label, %error, "names of relations cannot be read");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(lsn: u64, relations: &[(u32, u32, &str)]) -> RelationNames {
        let relation = |(oid, file, name): &(u32, u32, &str)| (*oid, *file, 1663, "public".into(), (*name).into(), 'r');
        let label = BackupLabel::at(jiff::Timestamp::from_second(lsn as i64).unwrap());
        let relations = relations.iter().map(relation).collect();
        let database = DatabaseNames { oid: 5, name: "shop".to_owned(), relations, left_out: None };
        RelationNames { label, lsn: Lsn::new(lsn), databases: vec![database] }
    }

    fn file(number: u32) -> Touched {
        Touched::File(RelFile { tablespace: 1663, database: 5, number })
    }

    #[test]
    fn a_name_is_that_of_its_time() {
        let mut names = Names::default();
        names.add(&picture(100, &[(20, 20, "orders"), (30, 30, "other")]));
        names.add(&picture(200, &[(20, 25, "orders_old")]));
        let name = |names: &Names, what, at| names.of(&what, Lsn::new(at)).map(|called| called.name.clone());
        assert_eq!(name(&names, file(20), 150).as_deref(), Some("orders"));
        assert_eq!(name(&names, file(25), 150).as_deref(), Some("orders_old"), "known by a later picture alone");
        assert_eq!(name(&names, Touched::Relation { database: 5, oid: 20 }, 250).as_deref(), Some("orders_old"));
        assert_eq!(name(&names, file(77), 150), None);
        names.dropped(file(20), Lsn::new(120));
        assert_eq!(name(&names, file(20), 110).as_deref(), Some("orders"));
        assert_eq!(name(&names, file(20), 120).as_deref(), Some("orders"), "by the transaction that dropped it");
        assert_eq!(name(&names, file(20), 121), None, "whoever has the number now");
        assert_eq!(names.named("public.orders"), [file(20), Touched::Relation { database: 5, oid: 20 }].into());
        assert_eq!(names.named("shop.public.other").len(), 2);
        assert!(names.named("orders2").is_empty());
    }
}
