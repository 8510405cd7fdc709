use super::*;
use crate::catalog::inventory::DamagedObject;
use crate::catalog::layout::PackName;
use crate::catalog::records::{GapReason, GapRecord};
use crate::catalog::survey::{Absent, Stored};
use crate::types::{Id128, Lsn};
use crate::verify::sample::{MIB, at, first, put_at, survey};

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn instants(finding: &Finding) -> Vec<(u64, u64)> {
    finding.instants.iter().map(|lost| (lost.from.get() / MIB, lost.to.get().div_ceil(MIB))).collect()
}

#[test]
fn a_hole_is_found_with_what_it_costs_and_a_recorded_one_is_known() {
    let whole = continuity(&survey(1..20, &[2, 10]), now());
    assert_eq!(whole, Continuity::default());
    let found = continuity(&survey((1..6).chain(8..20), &[2, 10]), now());
    let [hole] = found.findings.as_slice() else { panic!("{found:?}") };
    assert_eq!((hole.fault, hole.hole), (Fault::Hole, Some((first(), at(6), at(8)))));
    assert!(hole.object.ends_with("/000000010000000000000006.00000000-00100000"), "{}", hole.object);
    // From the hole to where the next base backup is consistent.
    assert_eq!(instants(hole), [(6, 12)], "{hole:?}");
    assert_eq!(hole.instants[0].to, at(11).advance(80));
    let about = |lost: Option<Timestamp>| lost.map(|at| at.as_second());
    assert_eq!(about(hole.instants[0].from_about), Some(put_at(5)), "the last that is there before it");
    assert_eq!(about(hole.instants[0].to_about), Some(put_at(11)));

    let mut known = survey((1..6).chain(8..20), &[2, 10]);
    let (noticed_at, writer) = (now(), Id128::new([0; 16]));
    let reason = GapReason::SlotLost;
    known.inventory.gaps.push(GapRecord { branch: first(), from: at(6), to: at(8), reason, noticed_at, writer });
    let found = continuity(&known, now());
    assert!(found.findings.is_empty() && found.remarks[0].contains("slot was lost"), "{found:?}");
}

#[test]
fn a_pack_that_is_missing_or_short_is_named_with_its_base_backups() {
    let mut survey = survey(1..20, &[2, 10]);
    let labels: Vec<_> = survey.manifests.keys().copied().collect();
    let pack = |number| PackName { label: labels[0], number };
    survey.packs.push(Stored { name: pack(2), token: None, len: 77, put_at: 0 });
    let gone = Absent { object: ClusterObject::Pack(pack(1)), len: 100, found: Vec::new() };
    let short = Absent { object: ClusterObject::Pack(pack(2)), len: 100, found: vec![77] };
    // Both base backups need the first pack, the newer one the second.
    survey.manifests.get_mut(&labels[0]).unwrap().absent = vec![gone.clone()];
    survey.manifests.get_mut(&labels[1]).unwrap().absent = vec![gone, short];
    let found = continuity(&survey, now()).findings;
    let [gone, short] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((gone.fault, gone.backups.as_slice()), (Fault::Missing, labels.as_slice()));
    assert_eq!(instants(gone), [(3, 20)], "nothing is left to restore from");
    assert_eq!((short.fault, short.backups.as_slice()), (Fault::Length, &labels[1..]));
    assert!(short.why.contains("77") && short.why.contains("100"), "{}", short.why);
    assert_eq!(instants(short), [], "the older one leads to the same instants");
}

#[test]
fn what_does_not_open_and_what_belongs_nowhere_is_found() {
    let mut survey = survey(1..20, &[2]);
    let cluster = survey.inventory.id.clone();
    let label = *survey.manifests.keys().next().unwrap();
    survey.unreadable.push(format!("{cluster}/backup/20261001T000000Z/manifest"));
    survey.odd.push(format!("{cluster}/expire/20261001T000000Z"));
    let (name, reason) = (format!("{cluster}/gap/x"), "it is cut short".to_owned());
    survey.inventory.damaged.push(DamagedObject { name, reason });
    let second: crate::types::Branch = "00000002".parse().unwrap();
    let mut orphan = survey.inventory.branches[&first()].clone();
    orphan.branch = second;
    survey.inventory.branches.insert(second, orphan);
    survey.wal.get_mut(&first()).unwrap()[4].len = 5;
    let found = continuity(&survey, now()).findings;
    let of = |word: &str| {
        found.iter().find(|finding| finding.object.contains(word)).unwrap_or_else(|| panic!("{word}: {found:#?}"))
    };
    assert_eq!(of("/manifest").backups, ["20261001T000000Z".parse().unwrap()]);
    assert_eq!(of("/expire/").fault, Fault::Damaged);
    assert_eq!(of("/gap/x").why, "it is cut short");
    assert_eq!(of("timeline/00000002.history").fault, Fault::Missing);
    let short = of("000000010000000000000005");
    assert_eq!((short.fault, instants(short)), (Fault::Length, vec![(5, 20)]));
    assert_eq!(found.len(), 5, "{label}: {found:#?}");
}

/// Two million segments, a thousand base backups and ten million references: what a listing of a large archive gives.
#[test]
fn a_large_archive_is_judged_in_seconds() {
    let full = std::env::var_os("PGKEEP_LARGE").is_some();
    let (segments, backups, references) = if full { (2_000_000, 1000, 10_000) } else { (20_000, 50, 200) };
    let begins: Vec<u64> = (0..backups).map(|number| 1 + number * (segments / backups)).collect();
    let mut survey = survey((1..segments).filter(|segment| *segment != segments / 2), &begins);
    let labels: Vec<_> = survey.manifests.keys().copied().collect();
    for label in &labels {
        for number in 1..=references / 10 {
            survey.packs.push(Stored { name: PackName { label: *label, number }, token: None, len: 9, put_at: 0 });
        }
    }
    let packs = u32::try_from(survey.packs.len()).unwrap();
    for manifest in survey.manifests.values_mut() {
        manifest.packs = (0..references).map(|number| number * (packs / references)).collect();
    }
    let begun = std::time::Instant::now();
    let found = continuity(&survey, now());
    let all = crate::verify::order::items(&survey);
    let known = crate::verify::known::Known::default();
    let wanted = crate::verify::Wanted { within: Some(jiff::SignedDuration::from_hours(720)), budget: None };
    let chosen = crate::verify::order::choose(&survey, &all, &known, &Default::default(), 1_800_000_000, wanted);
    eprintln!("{} objects judged and put in order in {:?}", all.len(), begun.elapsed());
    assert_eq!((found.findings.len(), chosen.len()), (1, all.len()));
    assert_eq!(found.findings[0].hole.map(|(_, from, _)| from), Some(Lsn::new(segments / 2 * MIB)));
}
