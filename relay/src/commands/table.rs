//! Tables for people: aligned columns, numbers to the right, the last column as long as it is.

use std::fmt;

pub struct Column {
    name: &'static str,
    right: bool,
}

pub const fn left(name: &'static str) -> Column {
    Column { name, right: false }
}

/// For numbers.
pub const fn right(name: &'static str) -> Column {
    Column { name, right: true }
}

pub struct Table<'a> {
    columns: &'a [Column],
    rows: Vec<Vec<String>>,
}

impl<'a> Table<'a> {
    pub fn new(columns: &'a [Column]) -> Self {
        Table { columns, rows: Vec::new() }
    }

    /// A cell for each column.
    pub fn add(&mut self, row: Vec<String>) {
        self.rows.push(row.iter().map(|cell| clean(cell)).collect());
    }

    fn width(&self, n: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count());
        cells.chain([self.columns[n].name.len()]).max().unwrap_or_default()
    }
}

/// A text of others on one line, with nothing in it that a terminal would obey.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || turns(c) { ' ' } else { c }).collect()
}

/// Whether it turns the direction of what follows, the rest of the line included (Unicode UAX #9, 2.1 to 2.5).
fn turns(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = (0..self.columns.len()).map(|n| self.width(n)).collect();
        let headings: Vec<String> = self.columns.iter().map(|column| column.name.to_owned()).collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let cells = row.iter().zip(self.columns).zip(&widths).map(|((cell, column), width)| match column.right {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_left_out() {
        assert_eq!(clean("a\u{1b}[31mb\nc\u{202e}d\u{2066}e"), "a [31mb c d e");
        assert_eq!(clean("שלום é 漢字"), "שלום é 漢字");
    }

    #[test]
    fn columns_are_aligned_and_numbers_stand_to_the_right() {
        let columns = [left("NAME"), right("DEAD"), left("LAST ERROR")];
        let mut table = Table::new(&columns);
        table.add(vec!["crm".into(), "12".into(), String::new()]);
        table.add(vec!["übersicht".into(), "3".into(), "can't connect".into()]);
        let lines = "NAME       DEAD  LAST ERROR\ncrm          12\nübersicht     3  can't connect\n";
        assert_eq!(table.to_string(), lines);
    }

    #[test]
    fn no_text_of_others_moves_the_cursor() {
        let columns = [left("ERROR")];
        let mut table = Table::new(&columns);
        table.add(vec!["a\u{1b}[2Jb\nc\u{9b}d".into()]);
        assert_eq!(table.to_string(), "ERROR\na [2Jb c d\n");
    }
}
