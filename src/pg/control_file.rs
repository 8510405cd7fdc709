//! Reads `global/pg_control`: what a data directory says about itself (`src/include/catalog/pg_control.h`).
//!
//! One layout serves 13 to 18 on 64-bit little-endian machines; only the place of the checksum differs. The server writes
//! the file in place, so a copy taken from a running server can be torn: the checksum tells, and reading again helps.

use std::ops::Range;

use crate::types::{Lsn, SegmentSize, SystemId, TimelineId};

/// What the file is cut down or padded to; all it says is in the first 296 bytes.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// What state the server left, or is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Just made by initdb.
    Startup,
    /// Shut down in good order.
    ShutDown,
    /// A standby that was shut down in good order.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// Recovering from a crash.
    CrashRecovery,
    /// Recovering from an archive or as a standby, or stopped in the middle of that.
    ArchiveRecovery,
    /// Running; or it crashed, and nobody has started it since.
    InProduction,
}

/// How much the WAL holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    /// Not enough for archiving.
    Minimal,
    /// Enough for archiving.
    Replica,
    /// Enough for logical decoding too.
    Logical,
}

/// The settings that a restored server must not have lower than the one that wrote the WAL (POSTGRES.md 9.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlParameters {
    /// `wal_level`.
    pub wal_level: WalLevel,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

/// The contents of `global/pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Made by initdb; shared by standbys, clones and restores.
    pub system: SystemId,
    /// The server's major version.
    pub major: u32,
    /// `Catalog version number`: identifies the major.
    pub catalog_version: u32,
    /// What state the server left.
    pub state: ClusterState,
    /// When the file was last written, in seconds since 1970.
    pub modified: i64,
    /// Where the newest checkpoint's record begins.
    pub checkpoint: Lsn,
    /// Where replay from that checkpoint begins.
    pub redo: Lsn,
    /// The checkpoint's timeline.
    pub timeline: TimelineId,
    /// The timeline before it; the same unless the checkpoint began a timeline.
    pub previous_timeline: TimelineId,
    /// `full_page_writes` at the checkpoint.
    pub full_page_writes: bool,
    /// Next transaction: epoch in the upper 32 bits.
    pub next_xid: u64,
    /// Oldest transaction that is not frozen.
    pub oldest_xid: u32,
    /// Oldest transaction still running at the checkpoint; 0 where that is not known.
    pub oldest_active_xid: u32,
    /// When the checkpoint was made, in seconds since 1970.
    pub checkpoint_time: i64,
    /// How far a recovery has to go at least before the data is consistent; `0/0` outside recovery.
    pub min_recovery_point: Lsn,
    /// The timeline of that position; `None` outside recovery.
    pub min_recovery_timeline: Option<TimelineId>,
    /// The start of the base backup that is being recovered; `0/0` when there is none.
    pub backup_start: Lsn,
    /// The end of a base backup that was taken from a standby; `0/0` when there is none.
    pub backup_end: Lsn,
    /// Must the record of the backup's end be met before the data is consistent?
    pub backup_end_required: bool,
    /// Settings that replay depends on.
    pub parameters: ControlParameters,
    /// Bytes of a data page; 8192 unless built otherwise.
    pub block_size: u32,
    /// Blocks per file of a relation; 131072 (1 GiB) unless built otherwise.
    pub blocks_per_file: u32,
    /// Bytes of a WAL page; 8192 unless built otherwise.
    pub wal_block_size: u32,
    /// Size of the WAL's segments.
    pub segment_size: SegmentSize,
    /// Have pages checksums?
    pub data_checksums: bool,
}

/// Bytes that are no control file we can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Too few bytes.
    #[error("pg_control has {len} bytes, which is too few: it was cut short")]
    Short {
        /// How many there are.
        len: usize,
    },
    /// The checksum does not match.
    #[error("pg_control's checksum does not match: it is damaged, or was read while the server wrote it")]
    Checksum,
    /// Written by a server, or on a machine, that we do not know.
    #[error(
        "pg_control has version {version} and catalog version {catalog}: not one of PostgreSQL 13 to 18 on a 64-bit \
         little-endian machine"
    )]
    Version {
        /// `pg_control version number`.
        version: u32,
        /// `Catalog version number`.
        catalog: u32,
    },
    /// A value that no server writes.
    #[error("pg_control holds {value} as {field}, which no server writes")]
    Value {
        /// Which field.
        field: &'static str,
        /// What is there.
        value: u64,
    },
}

impl ControlFileError {
    /// May reading the file again help? Only when it comes from a running server.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Checksum => true,
            Self::Short { .. } | Self::Version { .. } | Self::Value { .. } => false,
        }
    }
}

/// `catalog_version_no` of each major, as released.
const CATALOG_VERSIONS: [(u32, u32); 6] =
    [(202_007_201, 13), (202_107_181, 14), (202_209_061, 15), (202_307_071, 16), (202_406_281, 17), (202_506_291, 18)];
/// `floatFormat`: reads as this number only where floats, and the layout up to here, are as we think.
const FLOAT_FORMAT: f64 = 1_234_567.0;

/// Where the checksum of all bytes before it stands.
fn checksum_at(version: u32, catalog: u32) -> Result<usize, ControlFileError> {
    match version {
        1300 | 1700 => Ok(288),
        1800 => Ok(292), // one byte more before the nonce, and alignment
        _ => Err(ControlFileError::Version { version, catalog }),
    }
}

/// Changes the system identifier in the file's bytes, and the checksum with it: for copies of a cluster that was never started.
pub(super) fn set_system_identifier(bytes: &mut [u8], identifier: u64) -> Result<(), ControlFileError> {
    let read = ControlFile::parse(bytes)?;
    let crc_at = checksum_at(Raw(bytes).u32(8)?, read.catalog_version)?;
    bytes[..8].copy_from_slice(&identifier.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&checksum.to_le_bytes());
    Ok(())
}

impl ControlFile {
    /// Reads the file's bytes. Its checksum is checked first: nothing is believed without it.
    pub fn parse(bytes: &[u8]) -> Result<ControlFile, ControlFileError> {
        let raw = Raw(bytes);
        let version = raw.u32(8)?;
        let catalog = raw.u32(12)?;
        let unknown = ControlFileError::Version { version, catalog };
        let crc_at = checksum_at(version, catalog)?;
        if crc32c::crc32c(raw.get(0..crc_at)?) != raw.u32(crc_at)? {
            return Err(ControlFileError::Checksum);
        }
        let major = CATALOG_VERSIONS.into_iter().find(|(known, _)| *known == catalog).map(|(_, major)| major);
        let float_format = raw.u64(208)?;
        let major = major.filter(|_| float_format == FLOAT_FORMAT.to_bits()).ok_or(unknown)?;
        let timeline = |at, field| {
            let number = raw.u32(at)?;
            TimelineId::new(number).ok_or(ControlFileError::Value { field, value: number.into() })
        };
        let segment_bytes = u64::from(raw.u32(228)?);
        let segment_size = SegmentSize::new(segment_bytes);
        Ok(ControlFile {
            system: SystemId::new(raw.u64(0)?),
            major,
            catalog_version: catalog,
            state: match raw.u32(16)? {
                0 => ClusterState::Startup,
                1 => ClusterState::ShutDown,
                2 => ClusterState::ShutDownInRecovery,
                3 => ClusterState::ShuttingDown,
                4 => ClusterState::CrashRecovery,
                5 => ClusterState::ArchiveRecovery,
                6 => ClusterState::InProduction,
                other => return Err(ControlFileError::Value { field: "state", value: other.into() }),
            },
            modified: raw.i64(24)?,
            checkpoint: raw.lsn(32)?,
            redo: raw.lsn(40)?,
            timeline: timeline(48, "the checkpoint's timeline")?,
            previous_timeline: timeline(52, "the previous timeline")?,
            full_page_writes: raw.bool(56)?,
            next_xid: raw.u64(64)?,
            oldest_xid: raw.u32(84)?,
            oldest_active_xid: raw.u32(120)?,
            checkpoint_time: raw.i64(104)?,
            min_recovery_point: raw.lsn(136)?,
            min_recovery_timeline: TimelineId::new(raw.u32(144)?),
            backup_start: raw.lsn(152)?,
            backup_end: raw.lsn(160)?,
            backup_end_required: raw.bool(168)?,
            parameters: ControlParameters {
                wal_level: match raw.u32(172)? {
                    0 => WalLevel::Minimal,
                    1 => WalLevel::Replica,
                    2 => WalLevel::Logical,
                    other => return Err(ControlFileError::Value { field: "wal_level", value: other.into() }),
                },
                wal_log_hints: raw.bool(176)?,
                max_connections: raw.i32(180)?,
                max_worker_processes: raw.i32(184)?,
                max_wal_senders: raw.i32(188)?,
                max_prepared_transactions: raw.i32(192)?,
                max_locks_per_transaction: raw.i32(196)?,
                track_commit_timestamp: raw.bool(200)?,
            },
            block_size: raw.u32(216)?,
            blocks_per_file: raw.u32(220)?,
            wal_block_size: raw.u32(224)?,
            segment_size: segment_size
                .ok_or(ControlFileError::Value { field: "the size of WAL segments", value: segment_bytes })?,
            data_checksums: raw.u32(252)? != 0,
        })
    }
}

/// The file's bytes; every read says [`ControlFileError::Short`] beyond their end.
struct Raw<'a>(&'a [u8]);

impl Raw<'_> {
    fn get(&self, range: Range<usize>) -> Result<&[u8], ControlFileError> {
        self.0.get(range).ok_or(ControlFileError::Short { len: self.0.len() })
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], ControlFileError> {
        self.get(at..at + N)?.try_into().map_err(|_| ControlFileError::Short { len: self.0.len() })
    }

    fn u32(&self, at: usize) -> Result<u32, ControlFileError> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn i32(&self, at: usize) -> Result<i32, ControlFileError> {
        self.array(at).map(i32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, ControlFileError> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn i64(&self, at: usize) -> Result<i64, ControlFileError> {
        self.array(at).map(i64::from_le_bytes)
    }

    fn bool(&self, at: usize) -> Result<bool, ControlFileError> {
        self.array::<1>(at).map(|[byte]| byte != 0)
    }

    fn lsn(&self, at: usize) -> Result<Lsn, ControlFileError> {
        self.u64(at).map(Lsn::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file as PostgreSQL 15 would write it.
    fn example() -> Vec<u8> {
        let mut file = vec![0; CONTROL_FILE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &7_312_345_678_901_234_567_u64.to_le_bytes());
        for (at, number) in [
            (8, 1300),
            (12, 202_209_061),
            (16, 6),
            (48, 2),
            (52, 1),
            (172, 1),
            (180, 100),
            (216, 8192),
            (220, 131_072),
            (224, 8192),
            (228, 16 << 20),
            (252, 1),
        ] {
            put(at, &u32::to_le_bytes(number));
        }
        put(40, &0x1_0000_0028_u64.to_le_bytes());
        put(208, &FLOAT_FORMAT.to_le_bytes());
        seal(&mut file);
        file
    }

    fn seal(file: &mut [u8]) {
        let crc = crc32c::crc32c(&file[..288]);
        file[288..292].copy_from_slice(&crc.to_le_bytes());
    }

    #[test]
    fn a_new_identifier_is_the_only_change() {
        let mut file = example();
        set_system_identifier(&mut file, 77).unwrap();
        let (before, after) = (ControlFile::parse(&example()).unwrap(), ControlFile::parse(&file).unwrap());
        assert_eq!(after.system, SystemId::new(77));
        assert_eq!(format!("{:?}", ControlFile { system: before.system, ..after }), format!("{before:?}"));
    }

    #[test]
    fn fields_are_where_the_server_puts_them() {
        let control = ControlFile::parse(&example()).unwrap();
        assert_eq!((control.major, control.state), (15, ClusterState::InProduction));
        assert_eq!((control.timeline.get(), control.previous_timeline.get()), (2, 1));
        assert_eq!(control.redo.to_string(), "1/28");
        assert_eq!(control.parameters.max_connections, 100);
        assert_eq!((control.segment_size, control.data_checksums), (SegmentSize::DEFAULT, true));
        assert_eq!(control.min_recovery_timeline, None);
    }

    #[test]
    fn what_we_do_not_know_is_refused_by_name() {
        let changed = |at: usize, number: u32| {
            let mut file = example();
            file[at..at + 4].copy_from_slice(&number.to_le_bytes());
            seal(&mut file);
            ControlFile::parse(&file)
        };
        assert!(matches!(changed(8, 1900), Err(ControlFileError::Version { version: 1900, .. })));
        assert!(matches!(changed(12, 202_209_060), Err(ControlFileError::Version { catalog: 202_209_060, .. })));
        assert!(matches!(changed(208, 1), Err(ControlFileError::Version { .. })));
        assert!(matches!(changed(16, 7), Err(ControlFileError::Value { field: "state", value: 7 })));
        assert!(matches!(changed(48, 0), Err(ControlFileError::Value { .. })));
        assert!(matches!(changed(228, 3 << 20), Err(ControlFileError::Value { .. })));
    }

    proptest! {
        #[test]
        fn pitfall_18_a_torn_or_damaged_file_is_refused(at in 0usize..292, bit in 0u8..8) {
            let mut file = example();
            file[at] ^= 1 << bit;
            prop_assert!(ControlFile::parse(&file).is_err());
        }

        #[test]
        fn a_cut_file_is_refused(len in 0usize..292) {
            prop_assert_eq!(ControlFile::parse(&example()[..len]), Err(ControlFileError::Short { len }));
        }
    }
}
