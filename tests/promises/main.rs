//! What the documents say of tests and of code is so.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// A test is a function of its own, or a line of a macro that makes one.
fn has_test(text: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        let whole = !before.ends_with(is_word) && !after.starts_with(is_word);
        let line = before.rsplit('\n').next().unwrap_or_default().trim_end();
        whole && (line.ends_with("fn") || line.trim().is_empty())
    })
}

#[test]
fn tests_that_the_guarantees_name_exist() -> Result<()> {
    let document = read("docs/guarantees.md")?;
    let mut models = String::new();
    for entry in fs::read_dir(root().join("models/tests"))? {
        let path = entry?.path();
        if path.is_file() {
            models.push_str(&fs::read_to_string(path)?);
        }
    }
    let mut named = 0;
    for row in document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        for test in quoted(cells.get(1).copied().unwrap_or_default()) {
            let (file, name) = test.split_once("::").with_context(|| format!("no test: {test}"))?;
            ensure!(has_test(&read(file)?, name), "{file} has no test {name}");
            named += 1;
        }
        for word in quoted(cells.get(2).copied().unwrap_or_default()) {
            match word.split_once("::") {
                Some((file, name)) => ensure!(has_test(&read(file)?, name), "{file} has no test {name}"),
                // A function of SQL, named as a place of a fault.
                None if word.starts_with('_') => {}
                None => ensure!(has_test(&models, word), "no model has the variant {word}"),
            }
        }
    }
    ensure!(named > 40, "only {named} tests were found in the document");
    Ok(())
}

#[test]
fn a_name_that_is_no_test_is_noticed() {
    assert!(has_test("#[test]\nfn a() {}\n", "a"));
    assert!(has_test("    hold:\n        a\n        b;\n", "b"));
    assert!(!has_test("fn ab() { a() }", "a"));
}

#[test]
fn unsafe_blocks_are_as_many_as_the_document_says() -> Result<()> {
    let document = read("docs/unsafe.md")?;
    let listed = |file: &str| {
        let start = format!("| `{file}` | ");
        let row = document.lines().find_map(|line| line.strip_prefix(start.as_str()));
        row.and_then(|rest| rest.split(' ').next()).map_or(Ok(0), str::parse::<usize>)
    };
    let mut files = 0;
    for entry in fs::read_dir(root().join("pg_outbox_ext/src"))? {
        let path = entry?.path();
        let file = path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
        let text = fs::read_to_string(&path)?;
        let blocks = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .map(|line| line.matches("unsafe {").count());
        let blocks: usize = blocks.sum();
        ensure!(
            blocks == listed(&file)?,
            "{file} has {blocks} unsafe blocks, docs/unsafe.md says {}: read them",
            listed(&file)?
        );
        files += usize::from(blocks > 0);
    }
    let rows = document.lines().filter(|line| line.starts_with("| `")).count();
    ensure!(files == rows, "docs/unsafe.md lists {rows} files, {files} have unsafe blocks");
    Ok(())
}
