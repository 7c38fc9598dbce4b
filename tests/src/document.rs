//! The tables that benchmarks keep in the documentation.

use std::fs;
use std::io;
use std::path::Path;

/// Puts `table` into the document at `path`, in place of what is there between the lines that name `bench`.
pub fn replace(path: &Path, bench: &str, table: &str) -> io::Result<()> {
    let begin = format!("<!-- {bench} -->");
    let end = format!("<!-- end of {bench} -->");
    let document = fs::read_to_string(path)?;
    let parts = document
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) =
        parts.ok_or_else(|| io::Error::other(format!("the document has no place for {bench}")))?;
    fs::write(path, format!("{before}{begin}\n{table}{end}{after}"))
}
