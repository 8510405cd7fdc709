//! Bodies taken apart: block references, images of every kind and version, the other fragments.

use super::builder::{WalBuilder, main_fragment};
use super::*;
use crate::types::{Lsn, SegmentSize};

const REL: [u8; 12] = [0x7F, 6, 0, 0, 0, 0x40, 0, 0, 0x10, 0x40, 0, 0];

fn with_record<T>(major: u32, body: &[u8], look: impl FnOnce(&Record<'_>) -> T) -> T {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut wal = WalBuilder::new(major, size, Lsn::new(1 << 20));
    wal.record(10, 0, 7, body);
    let mut decoder = Decoder::new(wal.start, size);
    decoder.push(wal.bytes);
    look(&decoder.next().unwrap().unwrap())
}

/// A block reference with an image: `flags` of `bimg_info`, the length, the hole.
fn image_body(info: u8, len: u16, hole_offset: u16, hole_len: Option<u16>) -> Vec<u8> {
    let mut body = vec![0, 0x10, 0, 0];
    body.extend(len.to_le_bytes());
    body.extend(hole_offset.to_le_bytes());
    body.push(info);
    body.extend(hole_len.iter().flat_map(|len| len.to_le_bytes()));
    body.extend(REL);
    body.extend(9u32.to_le_bytes());
    body.extend([255, 3]);
    body.extend(vec![0x11; usize::from(len)]);
    body.extend(b"abc");
    body
}

#[test]
fn pitfall_30_images_of_every_kind() {
    use Compression::*;
    // version, bimg_info, length, hole offset, hole length if it is written; compression, hole length, apply
    let cases = [
        (13, 0x5, 8000, 100, None, None, 192, true),
        (14, 0x1, 8000, 100, None, None, 192, false),
        (14, 0x7, 500, 100, Some(200), Some(Pglz), 200, true),
        (14, 0x6, 500, 0, None, Some(Pglz), 0, true),
        (15, 0x3, 8000, 100, None, None, 192, true),
        (15, 0x7, 500, 100, Some(200), Some(Pglz), 200, true),
        (16, 0xA, 500, 0, None, Some(Lz4), 0, true),
        (17, 0x13, 500, 40, Some(8000), Some(Zstd), 8000, true),
        (18, 0x10, 500, 0, None, Some(Zstd), 0, false),
        (18, 0x2, 8192, 0, None, None, 0, true),
    ];
    for (major, info, len, hole_offset, written, compression, hole_len, apply) in cases {
        let body = image_body(info, len, hole_offset, written);
        with_record(major, &body, |record| {
            let fragments = record.fragments().unwrap_or_else(|damage| panic!("{major} {info:X}: {damage}"));
            let bytes = vec![0x11; usize::from(len)];
            let image = Image { hole_offset, hole_len, compression, apply, bytes: &bytes };
            assert_eq!(fragments.blocks[0].image, Some(image), "{major} {info:X}");
            assert_eq!((fragments.main_data, record.main_data()), (&b"abc"[..], Ok(&b"abc"[..])));
        });
    }
    let impossible = [
        (14, 0x8, 500, 0, None),         // a bit that 14 does not have
        (18, 0xC, 500, 0, None),         // pglz and lz4
        (18, 0x3, 8192, 100, None),      // a hole of nothing
        (18, 0x2, 8000, 0, None),        // a page that is too short, and no hole
        (18, 0x2, 8200, 0, None),        // longer than a page
        (18, 0x3, 100, 8000, None),      // a hole beyond the page
        (18, 0x7, 100, 8000, Some(400)), // the same, compressed
        (18, 0x6, 100, 7, None),         // a hole's place, and no hole
    ];
    for (major, info, len, hole_offset, written) in impossible {
        with_record(major, &image_body(info, len, hole_offset, written), |record| {
            assert!(record.main_data().is_err(), "{major} {info:X} {len} {hole_offset}");
        });
    }
}

#[test]
fn all_fragments_together() {
    let mut body = vec![253, 0x34, 0x12, 252, 5, 0, 0, 0];
    body.extend([0, 0x20, 4, 0]);
    body.extend(REL);
    body.extend(1u32.to_le_bytes());
    body.extend([3, 0x80 | 0x40 | 2, 0, 0]); // the same relation's visibility map, to be initialised
    body.extend(2u32.to_le_bytes());
    body.extend([254, 2, 0, 0, 0]);
    body.extend(b"data");
    body.extend(b"mm");
    with_record(15, &body, |record| {
        let fragments = record.fragments().unwrap();
        let relation = RelFile { tablespace: 1663, database: 16384, number: 16400 };
        let block =
            |id, fork, block, will_init, data| BlockRef { id, relation, fork, block, will_init, image: None, data };
        assert_eq!(fragments.origin, Some(0x1234));
        assert_eq!(fragments.top_level_xid, Some(5));
        assert_eq!(
            fragments.blocks,
            [block(0, Fork::Main, 1, false, &b"data"[..]), block(3, Fork::VisibilityMap, 2, true, &[])]
        );
        assert_eq!(fragments.main_data, b"mm");
        assert_eq!((record.xid, record.total_len()), (7, 24 + body.len()));
    });
    with_record(13, &body, |record| assert!(record.fragments().is_err(), "13 has no top-level xid"));
    with_record(15, &[], |record| assert_eq!(record.main_data(), Ok(&[][..])));
    with_record(15, &main_fragment(&[7; 300]), |record| assert_eq!(record.main_data(), Ok(&[7; 300][..])));

    let mut broken = [body.clone(), body.clone(), body.clone(), body.clone()];
    broken[0].pop(); // a byte less than announced
    broken[1].push(0); // one more
    broken[2][8] = 4; // block 4, then block 3
    broken[3][9] |= 0x80; // the same relation as what?
    for (case, body) in broken.iter().enumerate() {
        with_record(15, body, |record| {
            let damage = record.main_data().unwrap_err();
            assert_eq!((damage.at(), damage.is_retryable()), (record.start, false), "{case}");
        });
    }
}
