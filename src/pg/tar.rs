//! Reads the tar archives that PostgreSQL sends in a base backup.
//!
//! PostgreSQL writes plain ustar and nothing else (`src/port/tar.c`): files, directories, symbolic links, no extended
//! headers. So this reader is strict: whatever else is there means that we have lost step with the archive or that
//! somebody made it up, and is an error. Names are relative, without `..`: none leads out of where it is unpacked.
//!
//! Servers up to 14 send archives without the two zero blocks at the end, later ones with them; both are whole archives
//! ([`TarReader::finish`]).
//!
//! Pure, and nothing is copied except headers: what goes in by [`TarReader::push`] comes out in slices of it.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};

/// Everything in an archive is padded to this.
const BLOCK: usize = 512;
/// What some writers fill the archive with after its end; more is not an archive's end any more.
const MAX_FILLING: u64 = 1 << 20;

/// What comes next in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent {
    /// A member begins. `size` bytes of [`TarEvent::Data`] follow for a file, none for the others.
    Entry(TarEntry),
    /// Next bytes of the file that began last; never empty.
    Data(Bytes),
    /// The two zero blocks that end an archive.
    End,
}

/// The head of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Relative, without `.`, `..` or a slash at the end. Bytes as the server's file system has them, mostly UTF-8.
    pub path: PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970, UTC.
    pub mtime: u64,
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file of `size` bytes.
    File {
        /// How many bytes of data follow.
        size: u64,
    },
    /// A directory.
    Directory,
    /// A symbolic link: a tablespace.
    Symlink {
        /// Where it points to, as the server wrote it.
        target: PathBuf,
    },
}

/// Bytes that are not an archive as PostgreSQL writes it. None is worth another try with the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at} of the archive: {problem}")]
pub struct TarError {
    /// Offset in the archive of the block that is wrong.
    pub at: u64,
    /// What is wrong with it.
    pub problem: TarProblem,
}

/// What is wrong with an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarProblem {
    /// The sum in a header is not that of its bytes.
    #[error("a header's checksum does not match: the archive was damaged, or is not one")]
    Checksum,
    /// Not the ustar format.
    #[error("a header is not in ustar format")]
    Magic,
    /// A field that should hold a number does not.
    #[error("a header's {0} is not a number")]
    Number(&'static str),
    /// A name that leads out of the directory, or that no server sends.
    #[error("member name {0:?} is not a plain relative path")]
    Name(String),
    /// A type of member that PostgreSQL never sends.
    #[error("member {name:?} has type {kind:?}, which PostgreSQL never sends")]
    Kind {
        /// The type's letter.
        kind: char,
        /// The member's name.
        name: String,
    },
    /// A directory or a link with contents, or a link to nowhere.
    #[error("member {0:?} is a directory or link with contents, or a link without a target")]
    Contents(String),
    /// Something where only zeros may be.
    #[error("there is something where only padding may be")]
    Padding,
    /// The archive stops in the middle of a member.
    #[error("the archive ends in the middle of a member")]
    Cut,
}

/// An incremental reader: push bytes as they arrive, and take events until there is none.
#[derive(Debug)]
pub struct TarReader {
    input: VecDeque<Bytes>,
    /// Offset in the archive of the first byte in `input`.
    at: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Collecting the block that may be a header; holds what there is of it.
    Header { block: Vec<u8>, after_zero_block: bool },
    /// In a file's contents.
    Data { remaining: u64, padding: u64 },
    /// Between a file's end and the block's end.
    Padding { remaining: u64 },
    /// After the end.
    Ended { filling: u64 },
    /// After an error: nothing that follows means anything.
    Broken(TarError),
}

impl State {
    const fn header() -> State {
        State::Header { block: Vec::new(), after_zero_block: false }
    }
}

impl Default for TarReader {
    fn default() -> Self {
        TarReader::new()
    }
}

impl TarReader {
    /// At the start of an archive.
    pub fn new() -> TarReader {
        TarReader { input: VecDeque::new(), at: 0, state: State::header() }
    }

    /// The next bytes of the archive, in pieces of any length. The reader holds them until they are taken as events, so
    /// take all events before pushing more.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.input.push_back(bytes);
        }
    }

    /// How many bytes of the archive were read so far.
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// The next event; `None` when more bytes are needed. After an error, that error again.
    pub fn next_event(&mut self) -> Result<Option<TarEvent>, TarError> {
        if let State::Broken(error) = &self.state {
            return Err(error.clone());
        }
        self.step().inspect_err(|error| self.state = State::Broken(error.clone()))
    }

    /// Says that the archive ends here; an error if it must not. Take all events before.
    pub fn finish(&self) -> Result<(), TarError> {
        match &self.state {
            State::Broken(error) => Err(error.clone()),
            State::Ended { .. } => Ok(()),
            // Up to 14 the zero blocks are missing. One alone was cut off.
            State::Header { block, after_zero_block: false } if block.is_empty() && self.input.is_empty() => Ok(()),
            State::Header { .. } | State::Data { .. } | State::Padding { .. } => {
                Err(TarError { at: self.at, problem: TarProblem::Cut })
            }
        }
    }

    fn step(&mut self) -> Result<Option<TarEvent>, TarError> {
        loop {
            // What has no more bytes to come is over, without waiting for any.
            if let State::Data { remaining: 0, padding } = self.state {
                self.state = State::Padding { remaining: padding };
            }
            if let State::Padding { remaining: 0 } = self.state {
                self.state = State::header();
            }
            let Some(front) = self.input.front_mut() else { return Ok(None) };
            let here = self.at;
            let event = match &mut self.state {
                State::Header { block, after_zero_block } => {
                    let wanted = (BLOCK - block.len()).min(front.len());
                    block.extend_from_slice(&front.split_to(wanted));
                    self.at += wanted as u64;
                    if block.len() < BLOCK {
                        None
                    } else {
                        let after_zero_block = *after_zero_block;
                        let block = std::mem::take(block);
                        self.block(&block, after_zero_block, self.at - BLOCK as u64)?
                    }
                }
                State::Data { remaining, .. } => {
                    let taken = front.split_to(at_most(*remaining, front.len()));
                    *remaining -= taken.len() as u64;
                    self.at += taken.len() as u64;
                    Some(TarEvent::Data(taken))
                }
                State::Padding { remaining } => {
                    let taken = front.split_to(at_most(*remaining, front.len()));
                    *remaining -= taken.len() as u64;
                    self.at += taken.len() as u64;
                    only_zeros(&taken, here)?;
                    None
                }
                State::Ended { filling } => {
                    let taken = front.split_to(front.len());
                    *filling += taken.len() as u64;
                    self.at += taken.len() as u64;
                    only_zeros(&taken, here)?;
                    if *filling > MAX_FILLING {
                        return Err(TarError { at: here, problem: TarProblem::Padding });
                    }
                    None
                }
                State::Broken(error) => return Err(error.clone()),
            };
            if self.input.front().is_some_and(|front| !front.has_remaining()) {
                self.input.pop_front();
            }
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// A whole block where a header or the end may be.
    fn block(&mut self, block: &[u8], after_zero_block: bool, at: u64) -> Result<Option<TarEvent>, TarError> {
        if block.iter().all(|byte| *byte == 0) {
            if after_zero_block {
                self.state = State::Ended { filling: 0 };
                return Ok(Some(TarEvent::End));
            }
            self.state = State::Header { block: Vec::new(), after_zero_block: true };
            return Ok(None);
        }
        let error = |problem| TarError { at, problem };
        if after_zero_block {
            return Err(error(TarProblem::Padding));
        }
        let entry = parse_header(block).map_err(error)?;
        let size = match entry.kind {
            EntryKind::File { size } => size,
            EntryKind::Directory | EntryKind::Symlink { .. } => 0,
        };
        let padding = size.wrapping_neg() % BLOCK as u64;
        self.state = State::Data { remaining: size, padding };
        Ok(Some(TarEvent::Entry(entry)))
    }
}

fn at_most(remaining: u64, available: usize) -> usize {
    usize::try_from(remaining).unwrap_or(usize::MAX).min(available)
}

fn only_zeros(bytes: &[u8], at: u64) -> Result<(), TarError> {
    match bytes.iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(offset) => Err(TarError { at: at + offset as u64, problem: TarProblem::Padding }),
    }
}

/// Fields of a ustar header, by offset and length.
struct Field(&'static str, usize, usize);
const NAME: Field = Field("name", 0, 100);
const MODE: Field = Field("mode", 100, 8);
const SIZE: Field = Field("size", 124, 12);
const MTIME: Field = Field("modification time", 136, 12);
const SUM: Field = Field("checksum", 148, 8);
const KIND: Field = Field("type", 156, 1);
const LINK: Field = Field("link target", 157, 100);
const MAGIC: Field = Field("magic and version", 257, 8);
const PREFIX: Field = Field("prefix", 345, 155);

impl Field {
    fn bytes<'a>(&self, block: &'a [u8]) -> &'a [u8] {
        block.get(self.1..self.1 + self.2).unwrap_or_default()
    }

    /// Up to the first zero byte, or all of it.
    fn text<'a>(&self, block: &'a [u8]) -> &'a [u8] {
        self.bytes(block).split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Octal digits ended by a space or zero byte; or, where those do not suffice, 0x80 and a big-endian number.
    fn number(&self, block: &[u8]) -> Result<u64, TarProblem> {
        let error = || TarProblem::Number(self.0);
        let bytes = self.bytes(block);
        if let [0x80, binary @ ..] = bytes {
            let (high, low) = binary.split_at_checked(binary.len().saturating_sub(8)).ok_or_else(error)?;
            let fits = high.iter().all(|byte| *byte == 0);
            return fits.then(|| low.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).ok_or_else(error);
        }
        let end = bytes.iter().position(|byte| matches!(byte, b' ' | 0)).unwrap_or(bytes.len());
        let (digits, rest) = bytes.split_at(end);
        let plain = !digits.is_empty()
            && digits.iter().all(|byte| (b'0'..=b'7').contains(byte))
            && rest.iter().all(|byte| matches!(byte, b' ' | 0));
        // At most twelve octal digits: 36 bits.
        plain.then(|| digits.iter().fold(0, |sum, digit| sum << 3 | u64::from(digit - b'0'))).ok_or_else(error)
    }
}

fn parse_header(block: &[u8]) -> Result<TarEntry, TarProblem> {
    let in_sum = |at: usize| !(SUM.1..SUM.1 + SUM.2).contains(&at);
    let sum: u64 = block.iter().enumerate().map(|(at, byte)| if in_sum(at) { u64::from(*byte) } else { 32 }).sum();
    if SUM.number(block).ok() != Some(sum) {
        return Err(TarProblem::Checksum);
    }
    if MAGIC.bytes(block) != b"ustar\x0000" {
        return Err(TarProblem::Magic);
    }
    let name = NAME.text(block);
    let shown = || String::from_utf8_lossy(name).into_owned();
    // `./pg_wal/archive_status/` is how servers write that one; the rest comes without the dot.
    let plain = name.strip_prefix(b"./").unwrap_or(name);
    let kind = KIND.bytes(block).first().copied().unwrap_or_default();
    // Links end in a slash as directories do (`tarCreateHeader`).
    let (path, slash) = match plain.strip_suffix(b"/") {
        Some(path) => (path, true),
        None => (plain, false),
    };
    if !is_plain_relative(path) || !PREFIX.text(block).is_empty() || (kind == b'0' && slash) {
        return Err(TarProblem::Name(shown()));
    }
    let (size, link) = (SIZE.number(block)?, LINK.text(block));
    let kind = match kind {
        b'0' if link.is_empty() => EntryKind::File { size },
        b'5' if size == 0 && link.is_empty() => EntryKind::Directory,
        b'2' if size == 0 && !link.is_empty() => {
            EntryKind::Symlink { target: Path::new(OsStr::from_bytes(link)).to_owned() }
        }
        b'0' | b'5' | b'2' => return Err(TarProblem::Contents(shown())),
        other => return Err(TarProblem::Kind { kind: char::from(other), name: shown() }),
    };
    let mode = u32::try_from(MODE.number(block)?).map_err(|_| TarProblem::Number(MODE.0))? & 0o7777;
    let path = Path::new(OsStr::from_bytes(path)).to_owned();
    Ok(TarEntry { path, kind, mode, mtime: MTIME.number(block)? })
}

fn is_plain_relative(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    #[derive(Debug, Clone)]
    struct Member {
        path: String,
        kind: u8,
        contents: Vec<u8>,
        mode: u32,
        mtime: u64,
    }

    fn a_member() -> impl Strategy<Value = Member> {
        let path = "[a-zA-Z0-9_.äß]{0,8}[a-zA-Z0-9]{1,8}(/[a-zA-Z0-9]{1,8}){0,4}";
        let contents = prop::collection::vec(any::<u8>(), 0..3000);
        (path, 0u8..3, contents, 0u32..0o10000, 0u64..1 << 33).prop_map(|(path, kind, contents, mode, mtime)| {
            let contents = if kind == 0 { contents } else { Vec::new() };
            Member { path, kind, contents, mode, mtime }
        })
    }

    /// Another implementation writes; without the end, as PostgreSQL 13 and 14.
    fn archive(members: &[Member]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for member in members {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(member.mode);
            header.set_mtime(member.mtime);
            header.set_size(member.contents.len() as u64);
            match member.kind {
                0 => header.set_path(&member.path).unwrap(),
                1 => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_path(format!("{}/", member.path)).unwrap();
                }
                _ => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_path(&member.path).unwrap();
                    header.set_link_name("/srv/space").unwrap();
                }
            }
            header.set_uid(26);
            header.set_gid(26);
            header.set_cksum();
            builder.append(&header, member.contents.as_slice()).unwrap();
        }
        let mut bytes = builder.into_inner().unwrap();
        assert!(bytes.len() >= 1024 && bytes.ends_with(&[0; 1024]));
        bytes.truncate(bytes.len() - 1024);
        bytes
    }

    type Contents = Vec<(TarEntry, Vec<u8>)>;

    /// Everything that comes out, with the pieces of each file joined; and whether the end blocks were there.
    fn read(bytes: &[u8], cuts: &[usize]) -> Result<(Contents, bool), TarError> {
        let mut reader = TarReader::new();
        let (mut members, mut ended, mut from): (Contents, _, _) = (Vec::new(), false, 0);
        let mut cuts = cuts.to_vec();
        cuts.sort_unstable();
        cuts.push(bytes.len());
        for to in cuts {
            reader.push(Bytes::copy_from_slice(&bytes[from..to]));
            from = to;
            while let Some(event) = reader.next_event()? {
                match event {
                    TarEvent::Entry(entry) => members.push((entry, Vec::new())),
                    TarEvent::Data(data) => members.last_mut().unwrap().1.extend_from_slice(&data),
                    TarEvent::End => ended = true,
                }
            }
        }
        assert_eq!(reader.offset(), bytes.len() as u64);
        reader.finish().map(|()| (members, ended))
    }

    fn expected(members: &[Member]) -> Vec<(TarEntry, Vec<u8>)> {
        let entry = |member: &Member| {
            let kind = match member.kind {
                0 => EntryKind::File { size: member.contents.len() as u64 },
                1 => EntryKind::Directory,
                _ => EntryKind::Symlink { target: "/srv/space".into() },
            };
            TarEntry { path: (&member.path).into(), kind, mode: member.mode, mtime: member.mtime }
        };
        members.iter().map(|member| (entry(member), member.contents.clone())).collect()
    }

    fn one_header(change: impl Fn(&mut [u8])) -> Vec<u8> {
        let member = Member { path: "base/1/1259".into(), kind: 0, contents: vec![7; 700], mode: 0o600, mtime: 1 };
        let mut bytes = archive(&[member]);
        change(&mut bytes);
        let sum: u32 = (0..BLOCK).map(|at| if (148..156).contains(&at) { 32 } else { u32::from(bytes[at]) }).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    }

    fn problem(bytes: &[u8]) -> TarProblem {
        read(bytes, &[]).expect_err("it should have been refused").problem
    }

    proptest! {
        /// However the network slices the archive, the same members come out, with and without the end blocks.
        #[test]
        fn pitfall_14_members_come_out_as_another_writer_put_them_in(
            members in prop::collection::vec(a_member(), 0..8),
            cuts in prop::collection::vec(any::<Index>(), 0..20),
            end in prop::sample::select(vec![0usize, 1024, 10240]),
        ) {
            let mut bytes = archive(&members);
            bytes.resize(bytes.len() + end, 0);
            let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            prop_assert_eq!(read(&bytes, &cuts), Ok((expected(&members), end > 0)));
        }

        /// An archive that was cut anywhere but between members is refused.
        #[test]
        fn a_cut_archive_is_refused(members in prop::collection::vec(a_member(), 1..5), cut in any::<Index>()) {
            let bytes = archive(&members);
            let mut borders = vec![0];
            for member in &members {
                borders.push(borders.last().unwrap() + BLOCK + member.contents.len().next_multiple_of(BLOCK));
            }
            let cut = cut.index(bytes.len());
            prop_assert_eq!(read(&bytes[..cut], &[]).is_ok(), borders.contains(&cut));
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000), at in any::<Index>(), byte: u8) {
            let _ = read(&bytes, &[]);
            let mut nearly = one_header(|_| {});
            let at = at.index(BLOCK);
            nearly[at] = byte;
            let _ = read(&nearly, &[]);
        }
    }

    #[test]
    fn a_member_that_leads_elsewhere_is_refused() {
        for name in
            ["/etc/passwd", "../up", "base/../../up", "base//1", "././base", "base/./1", "base/.", "", "./", "dir/"]
        {
            let bytes = one_header(|header| {
                header[..100].fill(0);
                header[..name.len()].copy_from_slice(name.as_bytes());
            });
            assert_eq!(problem(&bytes), TarProblem::Name(name.to_owned()), "{name:?}");
        }
    }

    #[test]
    fn what_postgresql_never_sends_is_refused() {
        for kind in ['1', '3', '6', '7', 'x', 'g', 'L', 'K', 'S', '\0'] {
            let name = "base/1/1259".to_owned();
            assert_eq!(problem(&one_header(|header| header[156] = kind as u8)), TarProblem::Kind { kind, name });
        }
        let contents = TarProblem::Contents("base/1/1259".to_owned());
        assert_eq!(problem(&one_header(|header| header[156] = b'5')), contents);
        assert_eq!(problem(&one_header(|header| header[156] = b'2')), contents);
        assert_eq!(problem(&one_header(|header| header[345] = b'p')), TarProblem::Name("base/1/1259".to_owned()));
        assert_eq!(problem(&one_header(|header| header[257..265].copy_from_slice(b"ustar  \0"))), TarProblem::Magic);
        assert_eq!(problem(&one_header(|header| header[130] = b'9')), TarProblem::Number("size"));
    }

    #[test]
    fn a_flipped_bit_in_a_header_or_padding_is_seen() {
        let mut bytes = one_header(|_| {});
        bytes[3] ^= 1;
        assert_eq!(problem(&bytes), TarProblem::Checksum);
        let mut bytes = one_header(|_| {});
        *bytes.last_mut().unwrap() = 1;
        assert_eq!(problem(&bytes), TarProblem::Padding);
        let mut bytes = one_header(|_| {});
        bytes.resize(bytes.len() + 512, 0);
        bytes.extend(one_header(|_| {}));
        assert_eq!(problem(&bytes), TarProblem::Padding, "a member after a single zero block");
    }

    #[test]
    fn a_dot_before_a_name_is_no_part_of_it() {
        let name = b"./pg_wal/archive_status";
        let bytes = one_header(|header| {
            header[..100].fill(0);
            header[..name.len()].copy_from_slice(name);
        });
        assert_eq!(read(&bytes, &[]).unwrap().0[0].0.path, Path::new("pg_wal/archive_status"));
    }

    #[test]
    fn an_error_stays() {
        let mut reader = TarReader::new();
        reader.push(Bytes::from(vec![1; 512]));
        assert!(reader.next_event().is_err());
        reader.push(Bytes::from(one_header(|_| {})));
        assert!(reader.next_event().is_err() && reader.finish().is_err());
    }

    #[test]
    fn sizes_beyond_eight_gigabytes_are_binary() {
        let bytes = one_header(|header| {
            header[124..136].fill(0);
            header[124] = 0x80;
            header[130] = 3; // 3 * 256^5
        });
        let mut reader = TarReader::new();
        reader.push(Bytes::from(bytes[..512].to_vec()));
        let Ok(Some(TarEvent::Entry(entry))) = reader.next_event() else { panic!("a header is there") };
        assert_eq!(entry.kind, EntryKind::File { size: 3 << 40 });
        let too_large = one_header(|header| {
            header[124..136].fill(0xFF);
            header[124] = 0x80;
        });
        assert_eq!(problem(&too_large), TarProblem::Number("size"));
    }
}
