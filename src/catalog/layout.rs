//! Every object's name: the only place that builds one or reads one.
//!
//! A name that was built here parses back to the same value. A name that does not parse, in whole and in exactly the
//! form in which it would be built, is [`UnknownName`]: it may belong to a newer version or to somebody else, so it is
//! never opened, never counted and never swept away.
//!
//! The names are those of `docs/format.md`. The part of a name that is sealed into an object is [`Object`]; a copy's
//! token (`~…`) is not, because a copy has the same bytes as the original.

use std::fmt;
use std::str::FromStr;

use crate::types::{
    BackupLabel, Branch, ClusterId, ClusterName, Digest, Id128, Lsn, ParseError, SegmentNumber, SegmentSize, SystemId,
    TimelineId, WalFileName,
};

pub mod folder;

/// The largest offset a segment can have: its size is at most 1 GiB.
const MAX_OFFSET: u32 = 1 << 30;

/// A name that nothing here understands. It is left alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of an object that this version of pgkeep knows; it is left alone")]
pub struct UnknownName(pub String);

/// An object's full name below the repository's root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// What the object is. Its text is what the object is sealed for.
    pub object: Object,
    /// Another copy of the same object, if this is one.
    pub copy: Option<CopyToken>,
}

/// What an object is, and where it belongs. Its text is the name without a copy's token.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// `format/0001.json`: what this repository is. Plain, without secrets. The number is that of the file's own form.
    Format(u16),
    /// `format/store-<second>.json`: what was found out about the store that this lies in. Plain, without secrets.
    StoreVerdict(Second),
    /// `keys/<key id>`: a content key or the realm's meta key in its envelope; the meta key's id begins `ffffffff`.
    Key(Id128),
    /// `keys/recipients/000001`: for whom content keys are wrapped; the greatest number counts.
    Recipients(u32),
    /// An object of one cluster: `<cluster>/<system id>/…`.
    Of(ClusterId, ClusterObject),
}

/// What an object of a cluster is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterObject {
    /// `timeline/<branch>.history`
    History(Branch),
    /// `wal/<branch>/<log>/<segment>.<from>-<to>`: a complete segment, or a part of one larger than 64 MiB.
    Wal(Branch, RangeName),
    /// `open/<branch>/<segment>.<from>-<to>`: a range of the open segment.
    Open(Branch, RangeName),
    /// `open/<branch>/<segment>.<from>-`: the tail of the open segment, which grows.
    Tail(Branch, SegmentName, u32),
    /// `partial/<branch>/<file>`: a `.partial` or `.backup` file that `archive_command` offered. Never read as a segment.
    WalFile(Branch, KeptFile),
    /// `pack/<label>/000001`
    Pack(PackName),
    /// `backup/<label>/start`: a base backup was begun.
    Start(BackupLabel),
    /// `backup/<label>/manifest`: it is complete; without this object it does not exist.
    Manifest(BackupLabel),
    /// `backup/<label>/files-000001` and the like: a piece of what the manifest names.
    Part(PartName),
    /// `index/<branch>/<from>-<to>`: what that WAL holds. 16 hex digits each.
    Index(Branch, Lsn, Lsn),
    /// `relations/<label>`: the names of relations as they were then.
    Relations(BackupLabel),
    /// `gap/<branch>/<from>-<to>`: WAL that should be there and is not. 16 hex digits each.
    Gap(Branch, Lsn, Lsn),
    /// `conflict/<branch>/<what>.<tag>`: bytes that somebody else wrote under a name that was taken.
    Conflict(Branch, Disputed, ContentTag),
    /// `expire/<second>`: what expiry condemned.
    ExpiryPlan(BackupLabel),
    /// `expire/<second>.going`: of that plan, what goes for good. The manifests go after it, the rest a while later.
    ExpiryGoing(BackupLabel),
    /// `hold/<second>`: something is not to be expired.
    Hold(BackupLabel),
    /// `hold/<second>.released`: that hold is over.
    HoldReleased(BackupLabel),
    /// `lease/<name>/<epoch>.<beat>`: somebody is at work.
    Lease(LeaseName),
    /// `event/<writer>/000001`: what a writer did or decided; numbered from 1.
    Event(Id128, u32),
    /// `verify/<second>`: what a verification found.
    Verification(BackupLabel),
    /// `drill/<second>`: how a drill went.
    Drill(BackupLabel),
}

/// One beat of a lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseName {
    name: String,
    /// Who holds it now: grows with each holder.
    pub epoch: u32,
    /// How often the holder has said so.
    pub beat: u32,
}

impl LeaseName {
    /// `None` unless the name is of `[a-z0-9-]`, at most 64.
    pub fn new(name: &str, epoch: u32, beat: u32) -> Option<LeaseName> {
        let plain = name.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase() || b == b'-');
        (plain && (1..=64).contains(&name.len())).then(|| LeaseName { name: name.to_owned(), epoch, beat })
    }

    /// What is leased.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next beat of the same holder.
    pub fn next(&self) -> LeaseName {
        LeaseName { beat: self.beat.saturating_add(1), ..self.clone() }
    }
}

/// A moment in UTC, to the second: `20261120T031500Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Second(BackupLabel);

impl Second {
    /// The second in which `moment` lies.
    pub fn of(moment: jiff::Timestamp) -> Second {
        Second(BackupLabel::at(moment)) // written alike
    }

    /// The one after it.
    pub fn next(self) -> Second {
        let next = self.0.start().saturating_add(jiff::SignedDuration::from_secs(1));
        Second(next.map_or(self.0, BackupLabel::at))
    }
}

/// A segment by the digits of its file name, whose meaning as a number depends on the segment size.
/// The order is that of the positions, whatever the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The first eight digits.
    pub timeline: TimelineId,
    /// The middle eight: the folder in which complete segments lie.
    pub log: u32,
    /// The last eight.
    pub within: u32,
}

impl SegmentName {
    /// The name of segment `number`; `None` beyond the end of the log's range (`FFFFFFFF/FFFFFFFF`).
    pub fn new(timeline: TimelineId, number: SegmentNumber, size: SegmentSize) -> Option<SegmentName> {
        let log = u32::try_from(number.get() / size.per_log()).ok()?;
        let within = u32::try_from(number.get() % size.per_log()).ok()?;
        Some(SegmentName { timeline, log, within })
    }

    /// The segment's number; `None` if a segment of this size cannot have these digits.
    pub fn number(self, size: SegmentSize) -> Option<SegmentNumber> {
        let within = u64::from(self.within);
        (within < size.per_log()).then(|| SegmentNumber::new(u64::from(self.log) * size.per_log() + within))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:08X}{:08X}", self.timeline, self.log, self.within)
    }
}

impl FromStr for SegmentName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parts = || {
            let (timeline, rest) = text.split_at_checked(8)?;
            let (log, within) = rest.split_at_checked(8)?;
            Some(SegmentName { timeline: timeline.parse().ok()?, log: hex_u32(log)?, within: hex_u32(within)? })
        };
        parts().ok_or_else(|| ParseError::new("the file name of a segment such as 000000010000000000000003", text))
    }
}

/// The bytes `[from, to)` of a segment, offsets within the segment: `<segment>.<from>-<to>`, eight hex digits each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RangeName {
    /// The segment.
    pub segment: SegmentName,
    from: u32,
    to: u32,
}

impl RangeName {
    /// `None` unless `from < to` and `to` is an offset that a segment can have.
    pub fn new(segment: SegmentName, from: u32, to: u32) -> Option<RangeName> {
        (from < to && to <= MAX_OFFSET).then_some(RangeName { segment, from, to })
    }

    /// Offset of the first byte in the segment.
    pub fn from(&self) -> u32 {
        self.from
    }

    /// Offset of the first byte after it.
    pub fn to(&self) -> u32 {
        self.to
    }

    /// Bytes of WAL, never 0.
    pub fn bytes(&self) -> u32 {
        self.to - self.from // invariant: from < to
    }
}

impl fmt::Display for RangeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:08X}-{:08X}", self.segment, self.from, self.to)
    }
}

/// A pack: the backup that wrote it, and its number from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    /// The backup.
    pub label: BackupLabel,
    /// From 1.
    pub number: u32,
}

impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:06}", self.label, self.number)
    }
}

impl FromStr for PackName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parts = text
            .split_once('/')
            .and_then(|(label, number)| Some(PackName { label: label.parse().ok()?, number: six_digits(number)? }));
        parts.ok_or_else(|| ParseError::new("a pack such as 20261120T031500Z/000001", text))
    }
}

crate::types::serde_by_text!(PackName);

/// What a numbered piece of a base backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PartKind {
    /// `files-`: a piece of the file table.
    Files,
    /// `tags-`: a piece of the block tags.
    Tags,
    /// `server-manifest-`: a piece of PostgreSQL's own `backup_manifest`.
    ServerManifest,
}

/// A numbered piece of a base backup: the backup that wrote it, and its number from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartName {
    /// The backup.
    pub label: BackupLabel,
    /// What it holds.
    pub kind: PartKind,
    /// From 1.
    pub number: u32,
}

impl PartKind {
    const ALL: [PartKind; 3] = [PartKind::Files, PartKind::Tags, PartKind::ServerManifest];

    pub(super) fn of_stem(stem: &str) -> Option<PartKind> {
        PartKind::ALL.into_iter().find(|kind| kind.stem() == stem)
    }

    pub(super) const fn stem(self) -> &'static str {
        match self {
            PartKind::Files => "files",
            PartKind::Tags => "tags",
            PartKind::ServerManifest => "server-manifest",
        }
    }
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}-{:06}", self.label, self.kind.stem(), self.number)
    }
}

impl FromStr for PartName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parts = text.split_once('/').and_then(|(label, rest)| {
            let (stem, number) = rest.rsplit_once('-')?;
            let kind = PartKind::of_stem(stem)?;
            Some(PartName { label: label.parse().ok()?, kind, number: six_digits(number)? })
        });
        parts.ok_or_else(|| ParseError::new("a piece of a backup such as 20261120T031500Z/files-000001", text))
    }
}

crate::types::serde_by_text!(PartName);

/// A file of `archive_command` that is neither a segment nor a history: kept, never read as a segment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeptFile(String);

impl KeptFile {
    /// `None` for segments and history files, which have names of their own.
    pub fn new(name: &WalFileName) -> Option<KeptFile> {
        match name {
            WalFileName::Partial(text) | WalFileName::BackupHistory(text) => Some(KeptFile(text.clone())),
            WalFileName::Segment(_) | WalFileName::History(_) => None,
        }
    }

    /// The file's own name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn timeline(&self) -> Option<TimelineId> {
        self.0.get(..8)?.parse().ok()
    }
}

impl FromStr for KeptFile {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let name = text.parse::<WalFileName>()?;
        KeptFile::new(&name).ok_or_else(|| ParseError::new("a .partial or .backup file", text))
    }
}

/// What a conflict is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Disputed {
    /// The bytes of a range.
    Range(RangeName),
    /// The branch's history file.
    History,
    /// A `.partial` or `.backup` file.
    File(KeptFile),
}

/// The first eight bytes of a digest: tells the disputed contents apart, and makes a repeated report the same name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentTag([u8; 8]);

impl From<&Digest> for ContentTag {
    fn from(digest: &Digest) -> ContentTag {
        let mut tag = [0; 8];
        tag.iter_mut().zip(digest.as_bytes()).for_each(|(to, from)| *to = *from);
        ContentTag(tag)
    }
}

impl fmt::Display for ContentTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ContentTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ContentTag {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let number = plain.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        let tag = number.map(|number| ContentTag(number.to_be_bytes()));
        tag.ok_or_else(|| ParseError::new("a content tag of 16 hex digits", text))
    }
}

/// Tells copies of one object apart: `[a-z0-9]`, at most 32.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyToken(String);

impl CopyToken {
    /// A token that nobody else makes.
    pub fn of(id: Id128) -> CopyToken {
        CopyToken(id.to_string())
    }

    /// The token without its `~`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CopyToken {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase());
        if plain && (1..=32).contains(&text.len()) {
            return Ok(CopyToken(text.to_owned()));
        }
        Err(ParseError::new("a copy's token (a-z and 0-9, at most 32)", text))
    }
}

impl Name {
    /// The object itself, no copy.
    pub fn new(object: Object) -> Name {
        Name { object, copy: None }
    }

    /// Another copy of the same object.
    pub fn copy(&self, token: CopyToken) -> Name {
        Name { object: self.object.clone(), copy: Some(token) }
    }

    /// Reads a name as the store lists it.
    pub fn parse(text: &str) -> Result<Name, UnknownName> {
        let unknown = || UnknownName(text.to_owned());
        let (stem, copy) = match text.split_once('~') {
            None => (text, None),
            Some((stem, token)) => (stem, Some(token.parse().map_err(|_| unknown())?)),
        };
        let object = parse_object(stem).ok_or_else(unknown)?;
        let name = Name { object, copy };
        // A second spelling of a name would be a second object: only the one that is built counts.
        (name.to_string() == text).then_some(name).ok_or_else(unknown)
    }
}

impl From<Object> for Name {
    fn from(object: Object) -> Name {
        Name::new(object)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.copy {
            None => write!(f, "{}", self.object),
            Some(token) => write!(f, "{}~{}", self.object, token.0),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Format(number) => write!(f, "format/{number:04}.json"),
            Object::StoreVerdict(Second(second)) => write!(f, "format/store-{second}.json"),
            Object::Key(id) => write!(f, "keys/{id}"),
            Object::Recipients(number) => write!(f, "keys/recipients/{number:06}"),
            Object::Of(cluster, object) => write!(f, "{cluster}/{object}"),
        }
    }
}

impl fmt::Display for ClusterObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClusterObject::History(branch) => write!(f, "timeline/{branch}.history"),
            ClusterObject::Wal(branch, range) => write!(f, "wal/{branch}/{:08X}/{range}", range.segment.log),
            ClusterObject::Open(branch, range) => write!(f, "open/{branch}/{range}"),
            ClusterObject::Tail(branch, segment, from) => write!(f, "open/{branch}/{segment}.{from:08X}-"),
            ClusterObject::WalFile(branch, file) => write!(f, "partial/{branch}/{}", file.0),
            ClusterObject::Pack(pack) => write!(f, "pack/{pack}"),
            ClusterObject::Start(label) => write!(f, "backup/{label}/start"),
            ClusterObject::Manifest(label) => write!(f, "backup/{label}/manifest"),
            ClusterObject::Part(part) => write!(f, "backup/{part}"),
            ClusterObject::Index(branch, from, to) => {
                write!(f, "index/{branch}/{:016X}-{:016X}", from.get(), to.get())
            }
            ClusterObject::Relations(label) => write!(f, "relations/{label}"),
            ClusterObject::Gap(branch, from, to) => write!(f, "gap/{branch}/{:016X}-{:016X}", from.get(), to.get()),
            ClusterObject::Conflict(branch, what, tag) => match what {
                Disputed::Range(range) => write!(f, "conflict/{branch}/{range}.{tag}"),
                Disputed::History => write!(f, "conflict/{branch}/history.{tag}"),
                Disputed::File(file) => write!(f, "conflict/{branch}/{}.{tag}", file.0),
            },
            ClusterObject::ExpiryPlan(second) => write!(f, "expire/{second}"),
            ClusterObject::ExpiryGoing(second) => write!(f, "expire/{second}.going"),
            ClusterObject::Hold(second) => write!(f, "hold/{second}"),
            ClusterObject::HoldReleased(second) => write!(f, "hold/{second}.released"),
            ClusterObject::Event(writer, number) => write!(f, "event/{writer}/{number:06}"),
            ClusterObject::Verification(second) => write!(f, "verify/{second}"),
            ClusterObject::Drill(second) => write!(f, "drill/{second}"),
            ClusterObject::Lease(LeaseName { name, epoch, beat }) => write!(f, "lease/{name}/{epoch:06}.{beat:06}"),
        }
    }
}

fn hex_u32(text: &str) -> Option<u32> {
    let plain = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

fn hex_lsn(text: &str) -> Option<Lsn> {
    let (high, low) = text.split_at_checked(8)?;
    Some(Lsn::new(u64::from(hex_u32(high)?) << 32 | u64::from(hex_u32(low)?)))
}

/// A number from 1, in six digits or more.
fn six_digits(text: &str) -> Option<u32> {
    let number = text.parse::<u32>().ok()?;
    (number > 0 && format!("{number:06}") == text).then_some(number)
}

/// Reads `<segment>.<from>-<to>`; `to` is absent in a tail's name.
fn range_parts(text: &str) -> Option<(SegmentName, u32, Option<u32>)> {
    let (segment, offsets) = text.split_once('.')?;
    let (from, to) = offsets.split_once('-')?;
    let to = if to.is_empty() { None } else { Some(hex_u32(to)?) };
    Some((segment.parse().ok()?, hex_u32(from)?, to))
}

fn range_of(branch: Branch, text: &str) -> Option<RangeName> {
    let (segment, from, to) = range_parts(text)?;
    let range = RangeName::new(segment, from, to?)?;
    (segment.timeline == branch.timeline).then_some(range)
}

fn parse_object(stem: &str) -> Option<Object> {
    let (first, rest) = stem.split_once('/')?;
    match first {
        "format" => {
            let stem = rest.strip_suffix(".json")?;
            match stem.strip_prefix("store-") {
                Some(second) => Some(Object::StoreVerdict(Second(second.parse().ok()?))),
                None => Some(Object::Format(stem.parse().ok()?)),
            }
        }
        "keys" => match rest.strip_prefix("recipients/") {
            Some(number) => Some(Object::Recipients(six_digits(number)?)),
            None => Some(Object::Key(rest.parse().ok()?)),
        },
        name => {
            let (system, rest) = rest.split_once('/')?;
            let cluster = ClusterId { name: name.parse().ok()?, system: system.parse().ok()? };
            Some(Object::Of(cluster, parse_cluster_object(rest)?))
        }
    }
}

fn parse_cluster_object(text: &str) -> Option<ClusterObject> {
    let (folder, rest) = text.split_once('/')?;
    if let Some(object) = parse_backup_object(folder, rest) {
        return Some(object);
    }
    if folder == "timeline" {
        return Some(ClusterObject::History(rest.strip_suffix(".history")?.parse().ok()?));
    }
    if folder == "relations" {
        return Some(ClusterObject::Relations(rest.parse().ok()?));
    }
    match (folder, rest.split_once('.')) {
        ("expire", None) => return Some(ClusterObject::ExpiryPlan(rest.parse().ok()?)),
        ("expire", Some((second, "going"))) => return Some(ClusterObject::ExpiryGoing(second.parse().ok()?)),
        ("hold", None) => return Some(ClusterObject::Hold(rest.parse().ok()?)),
        ("hold", Some((second, "released"))) => return Some(ClusterObject::HoldReleased(second.parse().ok()?)),
        ("verify", None) => return Some(ClusterObject::Verification(rest.parse().ok()?)),
        ("drill", None) => return Some(ClusterObject::Drill(rest.parse().ok()?)),
        _ => {}
    }
    let (branch, rest) = rest.split_once('/')?;
    if folder == "event" {
        return Some(ClusterObject::Event(branch.parse().ok()?, six_digits(rest)?));
    }
    if folder == "lease" {
        let (epoch, beat) = rest.split_once('.')?;
        return LeaseName::new(branch, epoch.parse().ok()?, beat.parse().ok()?).map(ClusterObject::Lease);
    }
    let branch: Branch = branch.parse().ok()?;
    match folder {
        "wal" => {
            let (log, range) = rest.split_once('/')?;
            let range = range_of(branch, range)?;
            (hex_u32(log)? == range.segment.log).then_some(ClusterObject::Wal(branch, range))
        }
        "open" => match range_parts(rest)? {
            (segment, from, None) => {
                let fits = segment.timeline == branch.timeline && from < MAX_OFFSET;
                fits.then_some(ClusterObject::Tail(branch, segment, from))
            }
            (_, _, Some(_)) => Some(ClusterObject::Open(branch, range_of(branch, rest)?)),
        },
        "partial" => {
            let file: KeptFile = rest.parse().ok()?;
            (file.timeline()? == branch.timeline).then_some(ClusterObject::WalFile(branch, file))
        }
        "gap" | "index" => {
            let (from, to) = rest.split_once('-')?;
            let (from, to) = (hex_lsn(from)?, hex_lsn(to)?);
            let object = if folder == "gap" { ClusterObject::Gap } else { ClusterObject::Index };
            (from < to).then(|| object(branch, from, to))
        }
        "conflict" => {
            let (what, tag) = rest.rsplit_once('.')?;
            let what = if what == "history" {
                Disputed::History
            } else if let Some(range) = range_of(branch, what) {
                Disputed::Range(range)
            } else {
                let file: KeptFile = what.parse().ok()?;
                (file.timeline()? == branch.timeline).then_some(Disputed::File(file))?
            };
            Some(ClusterObject::Conflict(branch, what, tag.parse().ok()?))
        }
        _ => None,
    }
}

fn parse_backup_object(folder: &str, rest: &str) -> Option<ClusterObject> {
    match folder {
        "pack" => Some(ClusterObject::Pack(rest.parse().ok()?)),
        "backup" => match rest.split_once('/')? {
            (label, "start") => Some(ClusterObject::Start(label.parse().ok()?)),
            (label, "manifest") => Some(ClusterObject::Manifest(label.parse().ok()?)),
            _ => Some(ClusterObject::Part(rest.parse().ok()?)),
        },
        _ => None,
    }
}

/// What a store may do otherwise for some objects: by key, because stores know no names.
pub mod rule {
    use super::{ClusterObject, Name, Object};

    /// Packs of base backups: most of the bytes, and read only when something is restored.
    pub fn is_pack(key: &str) -> bool {
        matches!(Name::parse(key), Ok(Name { object: Object::Of(_, ClusterObject::Pack(_)), .. }))
    }

    /// What is deleted again soon, in the course of things: a lock would keep it for nothing. Ranges of the open segment,
    /// and trials, which are no objects.
    pub fn is_short_lived(key: &str) -> bool {
        match Name::parse(key) {
            Ok(Name { object: Object::Of(_, object), .. }) => {
                matches!(object, ClusterObject::Open(..) | ClusterObject::Tail(..) | ClusterObject::Lease(_))
            }
            Ok(_) => false,
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests;
