//! The install script reads from top to bottom: a function calls only those of earlier files and of its own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

/// One function: its file and what it says.
struct Function {
    file: String,
    text: String,
}

fn files() -> Result<BTreeMap<String, String>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sql");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a file's name")?.to_owned();
        if path.is_file() && name.ends_with(".sql") {
            files.insert(name, std::fs::read_to_string(path)?);
        }
    }
    Ok(files)
}

/// By name, without the schema.
fn functions(files: &BTreeMap<String, String>) -> BTreeMap<String, Function> {
    let mut found = BTreeMap::new();
    for (file, text) in files {
        for part in text.split("CREATE FUNCTION ").skip(1) {
            let (name, _) = part.split_once('(').unwrap_or((part, ""));
            let name = name.rsplit('.').next().unwrap_or(name).to_owned();
            // A text that will be a function of an adopted table.
            if name.contains('%') {
                continue;
            }
            let text = part.split("\nCOMMENT ON").next().unwrap_or(part);
            found.insert(name, Function { file: file.clone(), text: without_texts(text) });
        }
    }
    found
}

/// Comments, and what stands in quotes within a line: a hint may name any function.
fn without_texts(text: &str) -> String {
    let line = |line: &str| {
        let code = line.split("--").next().unwrap_or(line);
        code.split('\'').step_by(2).collect::<Vec<_>>().join(" ")
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The functions that a text calls.
fn calls(text: &str) -> impl Iterator<Item = &str> {
    text.split("outbox.").skip(1).filter_map(|part| {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        part[end..].starts_with('(').then(|| &part[..end])
    })
}

#[test]
fn a_function_calls_only_earlier_files() -> Result<()> {
    let functions = functions(&files()?);
    assert!(functions.len() > 100, "only {} functions were found", functions.len());
    for (name, function) in &functions {
        for called in calls(&function.text) {
            let later = functions.get(called).filter(|other| other.file > function.file);
            assert!(later.is_none(), "{name} in {} calls {called} of a later file", function.file);
        }
    }
    Ok(())
}

#[test]
fn the_first_file_lists_all_others() -> Result<()> {
    let files = files()?;
    let (first, list) = files.first_key_value().context("no file")?;
    for name in files.keys().filter(|name| *name != first) {
        let stem = name.trim_end_matches(".sql");
        let (number, subject) = stem.split_once('_').context("NN_subject.sql")?;
        let listed = format!("{number} {}", subject.replace('_', " "));
        assert!(list.contains(&listed), "{first} does not list {listed:?}");
    }
    Ok(())
}

/// What a function says of itself, before its body.
fn header(text: &str) -> &str {
    let body = ["\nAS ", " AS $", "\nRETURN ", "\nBEGIN ATOMIC"].iter().filter_map(|begin| text.find(begin)).min();
    &text[..body.unwrap_or(text.len())]
}

/// Who calls an entry point is not known. An inner function is called by one of these or by the worker, which pins its own.
#[test]
fn entry_points_pin_search_path_and_inner_functions_inherit_it() -> Result<()> {
    let (mut pinned, mut inner) = (0, 0);
    for (name, function) in functions(&files()?) {
        let header = header(&function.text);
        let entered = !name.starts_with('_')
            || header.contains("SECURITY DEFINER")
            || header.contains("RETURNS trigger")
            || header.contains("RETURNS event_trigger");
        let pins = header.contains("SET search_path = pg_catalog, pg_temp");
        let written_in_c = header.contains("LANGUAGE c");
        if entered && !written_in_c {
            assert!(pins, "{name} in {} is an entry point and does not pin search_path", function.file);
            pinned += 1;
        } else {
            assert!(!header.contains("search_path"), "{name} in {} pins what it inherits", function.file);
            inner += 1;
        }
    }
    assert!(pinned > 50 && inner > 100, "{pinned} entry points, {inner} inner functions");
    Ok(())
}
