use super::{Lsn, ParseError, TimelineId};

/// One line of a history file: an ancestor and where it was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The ancestor's timeline.
    pub timeline: TimelineId,
    /// First position that is *not* the ancestor's: where its child begins.
    pub left_at: Lsn,
    /// PostgreSQL's remark (`no recovery target specified`, `before 2026-…`); may be empty.
    pub reason: String,
}

/// The ancestry of a timeline, oldest first, as its history file tells it. Timeline 1 has none and no file.
///
/// Invariant: timelines ascend strictly and stay below `timeline`; fork positions never descend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<HistoryEntry>,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors.
    pub const fn root(timeline: TimelineId) -> TimelineHistory {
        TimelineHistory { timeline, ancestors: Vec::new() }
    }

    /// Reads the text of `<timeline>.history`: `parent<TAB>position<TAB>reason`, `#` comments and blank lines allowed.
    pub fn parse(timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory, ParseError> {
        let text = String::from_utf8_lossy(text); // the reason may be in the server's encoding; the rest is ASCII
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for line in text.lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let error = || ParseError::new("a line of a history file: parent timeline, position, reason", line);
            let mut words = line.splitn(2, char::is_whitespace);
            let parent = words.next().and_then(|w| w.parse().ok()).and_then(TimelineId::new).ok_or_else(error)?;
            let rest = words.next().ok_or_else(error)?.trim_start();
            let (position, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let left_at = position.parse().map_err(|_| error())?;
            let ordered = ancestors.last().is_none_or(|last| last.timeline < parent && last.left_at <= left_at);
            if !ordered || parent >= timeline {
                return Err(error());
            }
            ancestors.push(HistoryEntry { timeline: parent, left_at, reason: reason.trim().to_owned() });
        }
        Ok(TimelineHistory { timeline, ancestors })
    }

    /// The timeline whose history this is.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Its ancestors, oldest first.
    pub fn ancestors(&self) -> &[HistoryEntry] {
        &self.ancestors
    }

    /// Where this timeline begins: the fork from its parent; `0/0` for a root.
    pub fn begins_at(&self) -> Lsn {
        self.ancestors.last().map_or(Lsn::ZERO, |entry| entry.left_at)
    }

    /// The timeline on this path whose bytes hold position `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.ancestors.iter().find(|entry| lsn < entry.left_at).map_or(self.timeline, |entry| entry.timeline)
    }

    /// Where this path left `timeline`; `None` for the newest timeline of the path and for one that is not on it.
    pub fn left_at(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors.iter().find(|entry| entry.timeline == timeline).map(|entry| entry.left_at)
    }

    /// Is `timeline` this one or one of its ancestors?
    pub fn contains(&self, timeline: TimelineId) -> bool {
        self.timeline == timeline || self.left_at(timeline).is_some()
    }

    /// The history of an ancestor, derived: a server may have lost the ancestor's own file.
    pub fn ancestor_history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        if timeline == self.timeline {
            return Some(self.clone());
        }
        let at = self.ancestors.iter().position(|entry| entry.timeline == timeline)?;
        Some(TimelineHistory { timeline, ancestors: self.ancestors[..at].to_vec() })
    }

    /// The path as stretches, oldest first: timeline, first position, first position after it (`None`: still open).
    pub fn path(&self) -> Vec<(TimelineId, Lsn, Option<Lsn>)> {
        let mut begin = Lsn::ZERO;
        let mut path = Vec::with_capacity(self.ancestors.len() + 1);
        for entry in &self.ancestors {
            path.push((entry.timeline, begin, Some(entry.left_at)));
            begin = entry.left_at;
        }
        path.push((self.timeline, begin, None));
        path
    }

    /// The text of the history file, as PostgreSQL would write it.
    pub fn to_text(&self) -> String {
        let line = |e: &HistoryEntry| format!("{}\t{}\t{}\n", e.timeline.get(), e.left_at, e.reason);
        self.ancestors.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn a_path_over_three_timelines() {
        let text =
            b"1\t0/3000060\tno recovery target specified\n\n# a remark\n2\t0/5000000\tbefore 2026-11-20 10:00:00+00\n";
        let history = TimelineHistory::parse(timeline(4), text).unwrap();
        let at = |lsn: &str| history.timeline_at(lsn.parse().unwrap()).get();
        assert_eq!([at("0/0"), at("0/300005F"), at("0/3000060"), at("0/4FFFFFF"), at("0/5000000")], [1, 1, 2, 2, 4]);
        assert_eq!(history.begins_at().to_string(), "0/5000000");
        assert_eq!(history.left_at(timeline(3)), None);
        assert!(!history.contains(timeline(3)) && history.contains(timeline(1)));
        assert_eq!(history.ancestor_history(timeline(2)).unwrap().begins_at().to_string(), "0/3000060");
        assert_eq!(TimelineHistory::parse(timeline(4), history.to_text().as_bytes()).unwrap(), history);
        assert_eq!(history.path().len(), 3);
    }

    #[test]
    fn a_history_that_contradicts_itself_is_refused() {
        for bad in ["x\t0/1\t", "1", "1\tzero\t", "2\t0/2\t\n1\t0/3\t", "1\t0/9\t\n2\t0/3\t", "3\t0/1\t", "0\t0/1\t"] {
            assert!(TimelineHistory::parse(timeline(3), bad.as_bytes()).is_err(), "{bad:?} was taken");
        }
    }
}
