use std::fmt;

/// On which side of its column a value stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers, sizes.
    Right,
}

/// Rows under a head, in columns as wide as they need to be, without lines: easy to read and to cut with awk.
#[derive(Debug, Clone)]
pub struct Table {
    aligns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Align)>) -> Table {
        let (head, aligns) = columns.into_iter().map(|(name, align)| (name.to_owned(), align)).unzip();
        Table { aligns, rows: vec![head] }
    }

    /// Adds a row; missing values are empty, values beyond the columns are left out.
    pub fn row<T: Into<String>>(&mut self, values: impl IntoIterator<Item = T>) {
        let mut row: Vec<String> = values.into_iter().map(Into::into).collect();
        row.resize(self.aligns.len(), String::new());
        self.rows.push(row);
    }

    /// Whether there is nothing under the head.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl fmt::Display for Table {
    /// No newline after the last row.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = vec![0; self.aligns.len()];
        for row in &self.rows {
            for (width, value) in widths.iter_mut().zip(row) {
                *width = (*width).max(value.chars().count());
            }
        }
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for ((value, width), align) in row.iter().zip(&widths).zip(&self.aligns) {
                match align {
                    Align::Left => line.push_str(&format!("{value:<width$}  ")),
                    Align::Right => line.push_str(&format!("{value:>width$}  ")),
                }
            }
            if number > 0 {
                f.write_str("\n")?;
            }
            f.write_str(line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([("backup", Align::Left), ("size", Align::Right), ("note", Align::Left)]);
        assert!(table.is_empty());
        table.row(["20261120T031500Z", "1.23 GB", ""]);
        table.row(["ä", "9 bytes"]);
        assert_eq!(
            table.to_string(),
            "backup               size  note\n20261120T031500Z  1.23 GB\nä                 9 bytes"
        );
    }
}
