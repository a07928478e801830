//! Answers as tables: columns as wide as their widest cell, two spaces apart.

/// A table with a heading line.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// The table with these columns and no row.
    pub(crate) fn new(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(|column| (*column).to_owned()).collect()] }
    }

    /// Adds a row: a cell for each column.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// A property a line, without a heading; what is not there is left out.
    pub(crate) fn properties(properties: Vec<(&str, Option<String>)>) -> String {
        let rows = properties
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| vec![name.to_owned(), value]))
            .collect();
        Self { rows }.text()
    }

    /// The table as lines of text.
    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(vec!["a".to_owned(), "10GiB".to_owned()]);
        table.row(vec!["longer".to_owned(), String::new()]);
        assert_eq!(table.text(), "NAME    SIZE\na       10GiB\nlonger\n");
    }
}
