//! One record: its header, and what its body is made of.

use super::error::WalDamage;
use super::page::{u16_at, u32_at};
use super::version::WalFormat;
use crate::types::Lsn;

/// Bytes of a record's header.
pub(super) const RECORD_HEADER: usize = 24;

/// Resource managers: which part of PostgreSQL wrote a record. The same numbers in 13 to 18.
pub mod rmgr {
    /// Checkpoints, switches, restore points, parameters, full-page images.
    pub const XLOG: u8 = 0;
    /// Ends of transactions.
    pub const XACT: u8 = 1;
    /// Files of relations that are created or cut short.
    pub const SMGR: u8 = 2;
    /// Databases.
    pub const DBASE: u8 = 4;
    /// Tablespaces.
    pub const TBLSPC: u8 = 5;
    /// What a standby has to know: locks and running transactions.
    pub const STANDBY: u8 = 8;
    /// Tables: multi-inserts, cleaning up.
    pub const HEAP2: u8 = 9;
    /// Tables: single rows.
    pub const HEAP: u8 = 10;
    /// Messages to logical decoding: as long as somebody likes.
    pub const LOGICALMSG: u8 = 21;
    /// The last of PostgreSQL's own.
    pub(in crate::wal) const LAST_BUILTIN: u8 = 21;
    /// The first that extensions may have, from 15 on.
    pub(in crate::wal) const FIRST_CUSTOM: u8 = 128;

    const NAMES: [&str; 22] = [
        "XLOG",
        "Transaction",
        "Storage",
        "CLOG",
        "Database",
        "Tablespace",
        "MultiXact",
        "RelMap",
        "Standby",
        "Heap2",
        "Heap",
        "Btree",
        "Hash",
        "Gin",
        "Gist",
        "Sequence",
        "SPGist",
        "BRIN",
        "CommitTs",
        "ReplicationOrigin",
        "Generic",
        "LogicalMessage",
    ];

    /// The name that `pg_waldump` shows; `None` for an extension's.
    pub fn name(rmgr: u8) -> Option<&'static str> {
        NAMES.get(usize::from(rmgr)).copied()
    }
}

/// A whole record whose checksum was verified. It borrows from the decoder that found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its first byte: what `recovery_target_lsn` compares.
    pub start: Lsn,
    /// Where the next one may begin: eight-byte aligned, the next segment after a switch. At a page's start the next
    /// record follows that page's header.
    pub end: Lsn,
    /// Start of the record before it.
    pub prev: Lsn,
    /// The transaction, or 0.
    pub xid: u32,
    /// Its resource manager ([`rmgr`]).
    pub rmgr: u8,
    /// Low nibble: general flags. High nibble: which of the resource manager's records it is.
    pub info: u8,
    /// The version that wrote it.
    pub format: &'static WalFormat,
    /// Everything after the header.
    pub(super) body: &'a [u8],
}

/// The fork of a relation's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fork {
    /// The data.
    Main,
    /// The free space map.
    FreeSpaceMap,
    /// The visibility map.
    VisibilityMap,
    /// What an unlogged relation begins with after a crash.
    Init,
}

/// A relation's files: tablespace, database, number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelFile {
    /// OID of the tablespace.
    pub tablespace: u32,
    /// OID of the database; 0 for shared relations.
    pub database: u32,
    /// Number of the file.
    pub number: u32,
}

/// How a full-page image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names of wal_compression's values
pub enum Compression {
    Pglz,
    Lz4,
    Zstd,
}

/// A full-page image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image<'a> {
    /// Where the hole that was left out begins, in bytes from the page's start.
    pub hole_offset: u16,
    /// Its length in bytes.
    pub hole_len: u16,
    /// How `bytes` are compressed, if they are.
    pub compression: Option<Compression>,
    /// Whether replay writes it over the block (as opposed to a consistency check).
    pub apply: bool,
    /// The page without its hole, perhaps compressed.
    pub bytes: &'a [u8],
}

/// A block that a record changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef<'a> {
    /// The reference's number within the record.
    pub id: u8,
    /// The files.
    pub relation: RelFile,
    /// Which of them.
    pub fork: Fork,
    /// The block's number.
    pub block: u32,
    /// Replay begins with an empty page.
    pub will_init: bool,
    /// The whole page, if the record brings it along.
    pub image: Option<Image<'a>>,
    /// What replay needs for this block.
    pub data: &'a [u8],
}

/// A record's body, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragments<'a> {
    /// The blocks it changes.
    pub blocks: Vec<BlockRef<'a>>,
    /// The replication origin, where one is set.
    pub origin: Option<u16>,
    /// The top-level transaction (14 and later, `wal_level = logical` only).
    pub top_level_xid: Option<u32>,
    /// What the record says beside its blocks.
    pub main_data: &'a [u8],
}

/// Block references are numbered from 0 to this.
const MAX_BLOCK_ID: u8 = 32;
const ID_TOP_LEVEL_XID: u8 = 252;
const ID_ORIGIN: u8 = 253;
const ID_DATA_LONG: u8 = 254;
const ID_DATA_SHORT: u8 = 255;

const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;

const IMAGE_HAS_HOLE: u8 = 0x01;
/// Bytes of a page of a relation.
const BLOCK_SIZE: u16 = 8192;

/// Reads a body front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    record: Lsn,
}

impl<'a> Cursor<'a> {
    fn fault(&self, what: &'static str) -> WalDamage {
        WalDamage::Content { at: self.record, what }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WalDamage> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(|| self.fault("a fragment is cut off"))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, WalDamage> {
        let taken = self.take(1)?;
        taken.first().copied().ok_or_else(|| self.fault("a fragment is cut off"))
    }

    fn u16(&mut self) -> Result<u16, WalDamage> {
        let taken = self.take(2)?;
        u16_at(taken, 0).ok_or_else(|| self.fault("a fragment is cut off"))
    }

    fn u32(&mut self) -> Result<u32, WalDamage> {
        let taken = self.take(4)?;
        u32_at(taken, 0).ok_or_else(|| self.fault("a fragment is cut off"))
    }
}

/// The header of a block reference; its image and data lie further back.
struct BlockHeader {
    id: u8,
    relation: RelFile,
    fork: Fork,
    block: u32,
    will_init: bool,
    image: Option<(u16, Image<'static>)>,
    data_len: u16,
}

/// What the fragment headers say, without their data.
struct Headers<'a> {
    origin: Option<u16>,
    top_level_xid: Option<u32>,
    main_len: usize,
    /// Images and data of the blocks in order, then the main data.
    data: &'a [u8],
}

impl<'a> Record<'a> {
    /// Everything after the record's header, as it was written.
    pub fn body(&self) -> &'a [u8] {
        self.body
    }

    /// Bytes of the record, its header included, padding not.
    pub fn total_len(&self) -> usize {
        RECORD_HEADER + self.body.len()
    }

    /// What the record says beside its blocks. Does not allocate.
    pub fn main_data(&self) -> Result<&'a [u8], WalDamage> {
        let headers = self.walk(|_| ())?;
        Ok(headers.data.get(headers.data.len() - headers.main_len..).unwrap_or_default())
    }

    /// Calls `on_block` with each block reference's number, relation and fork, and gives the main data. Does not allocate.
    pub(super) fn each_relation(&self, mut on_block: impl FnMut(u8, RelFile, Fork)) -> Result<&'a [u8], WalDamage> {
        let headers = self.walk(|block| on_block(block.id, block.relation, block.fork))?;
        Ok(headers.data.get(headers.data.len() - headers.main_len..).unwrap_or_default())
    }

    /// Takes the body apart.
    pub fn fragments(&self) -> Result<Fragments<'a>, WalDamage> {
        let mut found = Vec::new();
        let headers = self.walk(|block| found.push(block))?;
        let mut data = Cursor { bytes: headers.data, record: self.start };
        let mut blocks = Vec::with_capacity(found.len());
        for header in found {
            let BlockHeader { id, relation, fork, block, will_init, image, data_len } = header;
            let image = match image {
                Some((len, image)) => Some(Image { bytes: data.take(usize::from(len))?, ..image }),
                None => None,
            };
            let data = data.take(usize::from(data_len))?;
            blocks.push(BlockRef { id, relation, fork, block, will_init, image, data });
        }
        let Headers { origin, top_level_xid, .. } = headers;
        Ok(Fragments { blocks, origin, top_level_xid, main_data: data.bytes })
    }

    /// Reads the fragment headers and checks that what they announce is exactly what follows them.
    fn walk(&self, mut on_block: impl FnMut(BlockHeader)) -> Result<Headers<'a>, WalDamage> {
        let mut cursor = Cursor { bytes: self.body, record: self.start };
        let (mut origin, mut top_level_xid) = (None, None);
        let mut main_len = None;
        let (mut last_id, mut last_relation) = (None, None);
        let mut announced = 0usize; // at most 33 blocks of 128 KiB and 4 GiB of main data: fits
        // The headers end where what is left is what they announced; main data, if any, is announced last.
        while cursor.bytes.len() > announced {
            let id = cursor.u8()?;
            match id {
                ID_DATA_SHORT | ID_DATA_LONG => {
                    let len = if id == ID_DATA_SHORT { usize::from(cursor.u8()?) } else { cursor.u32()? as usize };
                    main_len = Some(len);
                    announced = announced.saturating_add(len);
                    break; // PostgreSQL writes nothing after it either
                }
                ID_ORIGIN => origin = Some(cursor.u16()?),
                ID_TOP_LEVEL_XID if self.format.top_level_xid => top_level_xid = Some(cursor.u32()?),
                0..=MAX_BLOCK_ID => {
                    if last_id.is_some_and(|last| last >= id) {
                        return Err(cursor.fault("its block references are out of order"));
                    }
                    let block = self.block_header(id, last_relation, &mut cursor)?;
                    (last_id, last_relation) = (Some(id), Some(block.relation));
                    announced += usize::from(block.data_len);
                    announced += block.image.map_or(0, |(len, _)| usize::from(len));
                    on_block(block);
                }
                _ => return Err(cursor.fault("it has a fragment of an unknown kind")),
            }
        }
        if cursor.bytes.len() != announced {
            return Err(cursor.fault("its fragments do not have the lengths they announce"));
        }
        Ok(Headers { origin, top_level_xid, main_len: main_len.unwrap_or(0), data: cursor.bytes })
    }

    fn block_header(
        &self,
        id: u8,
        last_relation: Option<RelFile>,
        cursor: &mut Cursor<'a>,
    ) -> Result<BlockHeader, WalDamage> {
        let flags = cursor.u8()?;
        let data_len = cursor.u16()?;
        if (flags & HAS_DATA != 0) != (data_len > 0) {
            return Err(cursor.fault("a block reference does not say clearly whether it has data"));
        }
        let fork = match flags & FORK_MASK {
            0 => Fork::Main,
            1 => Fork::FreeSpaceMap,
            2 => Fork::VisibilityMap,
            3 => Fork::Init,
            _ => return Err(cursor.fault("a block reference names an unknown fork")),
        };
        let image = if flags & HAS_IMAGE != 0 { Some(self.image_header(cursor)?) } else { None };
        let relation = if flags & SAME_REL != 0 {
            last_relation.ok_or_else(|| cursor.fault("its first block reference has no relation"))?
        } else {
            RelFile { tablespace: cursor.u32()?, database: cursor.u32()?, number: cursor.u32()? }
        };
        let block = cursor.u32()?;
        Ok(BlockHeader { id, relation, fork, block, will_init: flags & WILL_INIT != 0, image, data_len })
    }

    fn image_header(&self, cursor: &mut Cursor<'a>) -> Result<(u16, Image<'static>), WalDamage> {
        let len = cursor.u16()?;
        let hole_offset = cursor.u16()?;
        let info = cursor.u8()?;
        let bits = &self.format.image;
        if info & !(IMAGE_HAS_HOLE | bits.apply | bits.pglz | bits.lz4 | bits.zstd) != 0 {
            return Err(cursor.fault("a full-page image has unknown flags"));
        }
        let compression = match info & (bits.pglz | bits.lz4 | bits.zstd) {
            0 => None,
            bit if bit == bits.pglz => Some(Compression::Pglz),
            bit if bit == bits.lz4 => Some(Compression::Lz4),
            bit if bit == bits.zstd => Some(Compression::Zstd),
            _ => return Err(cursor.fault("a full-page image is compressed in two ways")),
        };
        let has_hole = info & IMAGE_HAS_HOLE != 0;
        let hole_len = match (compression, has_hole) {
            (Some(_), true) => cursor.u16()?,
            (Some(_), false) => 0,
            (None, _) => BLOCK_SIZE.checked_sub(len).ok_or_else(|| cursor.fault("a full-page image is too long"))?,
        };
        let hole_fits = u32::from(hole_offset) + u32::from(hole_len) <= u32::from(BLOCK_SIZE);
        if has_hole != (hole_len > 0) || (!has_hole && hole_offset != 0) || !hole_fits {
            return Err(cursor.fault("the hole of a full-page image is impossible"));
        }
        let apply = info & bits.apply != 0;
        Ok((len, Image { hole_offset, hole_len, compression, apply, bytes: &[] }))
    }
}
