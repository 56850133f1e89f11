//! Tables that align: text to the left, numbers to the right, two spaces between, nothing trailing.

use crate::terminal::{Terminal, Tone};

/// Spaces between columns.
const GAP: &str = "  ";

/// One cell.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A cell that stands out.
    pub(crate) fn toned(tone: Tone, text: impl Into<String>) -> Self {
        Self { text: text.into(), tone }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, tone: Tone::Plain }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

/// Which edge a column's texts share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Align {
    Left,
    Right,
}

/// A heading and its rows. Rows may come one at a time: a column then grows with the widest cell so far.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    headings: Vec<(&'static str, Align)>,
    widths: Vec<usize>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table of these columns; a heading that begins with `>` aligns its column to the right.
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        let headings: Vec<_> = headings
            .iter()
            .map(|heading| match heading.strip_prefix('>') {
                Some(number) => (number, Align::Right),
                None => (*heading, Align::Left),
            })
            .collect();
        let widths = headings.iter().map(|(heading, _)| heading.chars().count()).collect();
        Self { headings, widths, rows: Vec::new() }
    }

    /// Adds a row; it must have as many cells as there are headings, missing ones are empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells: Vec<Cell> = cells.into_iter().collect();
        self.widen(&cells);
        self.rows.push(cells);
    }

    /// The whole table, a newline after each line.
    pub(crate) fn render(&self, terminal: Terminal) -> String {
        let mut text = self.heading(terminal);
        for row in &self.rows {
            text.push('\n');
            text.push_str(&self.line(row, terminal));
        }
        text.push('\n');
        text
    }

    /// The heading line alone.
    pub(crate) fn heading(&self, terminal: Terminal) -> String {
        let headings: Vec<Cell> =
            self.headings.iter().map(|(heading, _)| Cell::toned(Tone::Faint, *heading)).collect();
        self.line(&headings, terminal)
    }

    /// One line of a table whose rows are not kept.
    pub(crate) fn stream(&mut self, cells: &[Cell], terminal: Terminal) -> String {
        self.widen(cells);
        self.line(cells, terminal)
    }

    fn widen(&mut self, cells: &[Cell]) {
        for (width, cell) in self.widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.text.chars().count());
        }
    }

    fn line(&self, cells: &[Cell], terminal: Terminal) -> String {
        let mut line = String::new();
        let last = cells.iter().rposition(|cell| !cell.text.is_empty()).map_or(0, |last| last + 1);
        let columns = self.headings.iter().zip(&self.widths).zip(cells).take(last).enumerate();
        for (i, (((_, align), width), cell)) in columns {
            if i > 0 {
                line.push_str(GAP);
            }
            let padding = " ".repeat(width.saturating_sub(cell.text.chars().count()));
            let text = terminal.paint(cell.tone, &cell.text);
            match align {
                Align::Right => line.extend([padding.as_str(), text.as_str()]),
                Align::Left if i + 1 == last => line.push_str(&text),
                Align::Left => line.extend([text.as_str(), padding.as_str()]),
            }
        }
        line
    }
}

/// Makes a row of cells from anything that becomes one.
macro_rules! cells {
    ($($cell:expr),+ $(,)?) => { [$($crate::table::Cell::from($cell)),+] };
}
pub(crate) use cells;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_tail() {
        let mut table = Table::new(&["SERVICE", ">RPS", "NOTE"]);
        table.row(cells!["demo/digits", "1,234/s", "split"]);
        table.row(cells!["b", "7/s", ""]);
        assert_eq!(
            table.render(Terminal::PLAIN),
            "SERVICE          RPS  NOTE\n\
             demo/digits  1,234/s  split\n\
             b                7/s\n"
        );
    }

    #[test]
    fn a_stream_keeps_the_widest_cell_so_far() {
        let mut table = Table::new(&["A", "B"]);
        assert_eq!(table.stream(&cells!["long", "x"], Terminal::PLAIN), "long  x");
        assert_eq!(table.stream(&cells!["s", "y"], Terminal::PLAIN), "s     y");
    }

    #[test]
    fn signs_of_more_than_one_byte_count_as_one_column() {
        let mut table = Table::new(&[">P50", "X"]);
        table.row(cells!["–", "a"]);
        table.row(cells!["1.00 ms", "b"]);
        assert_eq!(table.render(Terminal::PLAIN), "    P50  X\n      –  a\n1.00 ms  b\n");
    }
}
