//! The pages of `docs/reference/` say what the catalogs, the relay's help and its metrics say.
//!
//! Each test makes a page from a running server and relay and compares it with the file. With `UPDATE_REFERENCE=1` it
//! writes the file instead.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::receiver::Receiver;
use outbox_tests::relay;
use outbox_tests::scratch;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use tokio_postgres::Row;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

fn compare(name: &str, page: &str) -> Result<()> {
    let file = docs().join("reference").join(name);
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        return Ok(std::fs::write(file, page)?);
    }
    let kept = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let differing = page.lines().zip(kept.lines()).find(|(now, kept)| now != kept);
    let (now, kept_line) = differing.unwrap_or(("(the end)", "(the end)"));
    ensure!(
        page == kept,
        "docs/reference/{name} is not up to date: UPDATE_REFERENCE=1 make test ONLY=reference_pages writes it\n\
         is:        {kept_line}\nshould be: {now}"
    );
    Ok(())
}

/// A comment as a sentence.
fn sentence(comment: &str) -> String {
    let mut letters = comment.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    let end = if comment.ends_with('.') { "" } else { "." };
    first + letters.as_str() + end
}

/// For a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{}`", cell(text)) }
}

#[tokio::test]
async fn the_settings_are_those_of_the_server() -> Result<()> {
    let world = World::new().await?;
    let mut page = String::from(
        "# Settings of PostgreSQL\n\n\
         Superusers change theirs in `postgresql.conf`, or with `ALTER SYSTEM` and `SELECT pg_reload_conf()`; anybody may use\n\
         `SET` for the others. What they do is explained in [notifications](../consumers.md#notifications),\n\
         [retention](../operations.md#retention), [the inbox](../consumers.md#inbox) and\n\
         [addresses of webhooks](../webhooks.md#addresses).\n\n\
         | setting | type | default | changed by | |\n| --- | --- | --- | --- | --- |\n",
    );
    let sql = "SELECT name, vartype, boot_val, coalesce(unit, ''), coalesce(array_to_string(enumvals, ', '), ''),
                      short_desc, coalesce(extra_desc, ''), context
                 FROM pg_settings WHERE name LIKE 'outbox.%' ORDER BY name";
    for row in world.session.query(sql, &[]).await? {
        let [name, kind, default, unit, values, short, long, context]: [String; 8] =
            std::array::from_fn(|column| row.get::<_, Option<String>>(column).unwrap_or_default());
        let who = match context.as_str() {
            "superuser" => "superusers",
            "user" => "anybody",
            _ => bail!("{name} is set when {context}, which this page does not explain"),
        };
        ensure!(!short.is_empty(), "{name} has no description");
        let kind = match (kind.as_str(), unit.is_empty()) {
            ("enum", _) => values.split(", ").map(code).collect::<Vec<_>>().join(", "),
            (kind, true) => kind.to_owned(),
            (kind, false) => format!("{kind}, in {unit}"),
        };
        // As SHOW prints it: 7d rather than 604800.
        let shown = format!("SELECT current_setting('{name}') FROM set_config('{name}', $1, false)");
        let shown: String = world.session.query_one(&shown, &[&default]).await?.get(0);
        let shown = if shown.is_empty() { "empty".to_owned() } else { code(&shown) };
        writeln!(page, "| `{name}` | {kind} | {shown} | {who} | {} |", cell(format!("{short} {long}").trim()))?;
    }
    compare("settings.md", &page)
}

/// Where a page explains a function: in a block that begins with its signature.
fn explained() -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(docs())? {
        let path = file?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if !name.ends_with(".md") {
            continue;
        }
        let (mut heading, mut in_block) = (String::new(), false);
        for line in std::fs::read_to_string(&path)?.lines() {
            if line.starts_with("```") {
                in_block = !in_block;
            } else if let (false, Some((_, title))) = (in_block, line.split_once("# ")) {
                heading = if line.starts_with("# ") { String::new() } else { crate::docs::anchor(title) };
            }
            let place = format!("../{name}#{heading}").trim_end_matches('#').to_owned();
            if in_block {
                if let Some((function, _)) = line.strip_prefix("outbox.").and_then(|rest| rest.split_once('(')) {
                    found.entry(function.to_owned()).or_insert(place);
                }
            } else if heading == "the-relays-own-functions" {
                for part in line.split("`outbox.").skip(1) {
                    let function = part.split(['(', '`']).next().unwrap_or_default();
                    found.entry(function.to_owned()).or_insert(place.clone());
                }
            }
        }
    }
    Ok(found)
}

const FUNCTIONS: &str = r"
SELECT p.proname::text,
       replace(regexp_replace(pg_get_function_arguments(p.oid), '::[a-z ]+(\[\])?', '', 'g'), 'timestamp with time zone', 'timestamptz'),
       replace(pg_get_function_result(p.oid), 'timestamp with time zone', 'timestamptz'),
       coalesce(obj_description(p.oid, 'pg_proc'), ''),
       concat_ws(', ', CASE WHEN has_function_privilege('reference_producer', p.oid, 'EXECUTE') THEN 'producer' END,
                       CASE WHEN has_function_privilege('reference_relay', p.oid, 'EXECUTE') THEN 'relay' END,
                       CASE WHEN has_function_privilege('reference_monitor', p.oid, 'EXECUTE') THEN 'monitor' END,
                       CASE WHEN has_function_privilege('reference_operator', p.oid, 'EXECUTE') THEN 'operator' END)
  FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
       JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'pg_outbox'
 WHERE p.pronamespace = 'outbox'::regnamespace AND p.proname !~ '^_' AND p.prorettype <> 'trigger'::regtype
 ORDER BY 1, 2";

const COLUMNS: &str = "
SELECT a.attname::text, replace(format_type(a.atttypid, a.atttypmod), 'timestamp with time zone', 'timestamptz'),
       coalesce(regexp_replace(pg_get_expr(f.adbin, f.adrelid), '::[a-z]+', ''), ''), coalesce(col_description(a.attrelid, a.attnum), '')
  FROM pg_attribute a LEFT JOIN pg_attrdef f ON (f.adrelid, f.adnum) = (a.attrelid, a.attnum)
 WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum";

#[tokio::test]
async fn the_functions_are_those_of_the_catalog() -> Result<()> {
    let cluster = outbox_tests::cluster::Cluster::start().await?;
    let world = World::on(&cluster).await?;
    for kind in ["producer", "relay", "monitor", "operator"] {
        world.execute(&format!("CREATE ROLE reference_{kind}; SELECT outbox.grant_{kind}('reference_{kind}')")).await?;
    }
    let mut page = String::from(
        "# Functions and views\n\n\
         `CREATE EXTENSION pg_outbox` makes them in the schema `outbox`; the table `outbox_events` is in the schema that the\n\
         command names. A superuser may call every function, `PUBLIC` none; the [roles](../security.md#roles) are what\n\
         `outbox.grant_producer()` and its sisters give. Objects whose name begins with an underscore, and the tables that\n\
         are not listed here, are internal.\n\n## Functions\n",
    );
    let explained = explained()?;
    for row in world.session.query(FUNCTIONS, &[]).await? {
        let [name, arguments, result, comment, roles]: [String; 5] = std::array::from_fn(|column| row.get(column));
        ensure!(!comment.is_empty(), "outbox.{name} has no comment");
        let place = explained.get(&name).with_context(|| format!("no page of docs/ explains outbox.{name}"))?;
        let roles = if roles.is_empty() { "superusers alone".to_owned() } else { roles };
        let arguments = wrapped(&format!("outbox.{name}("), &arguments);
        write!(page, "\n### {name}\n\n```\n{arguments}) → {result}\n```\n\n")?;
        writeln!(page, "{} For: {roles}. [More]({place}).", sentence(&comment))?;
    }
    for (name, heading) in [
        ("outbox_events", "The table outbox_events"),
        ("outbox.destinations", "The view outbox.destinations"),
        ("outbox.deliveries", "The view outbox.deliveries"),
    ] {
        let comment: Option<String> =
            world.session.query_one("SELECT obj_description($1::text::regclass, 'pg_class')", &[&name]).await?.get(0);
        let comment = comment.with_context(|| format!("{name} has no comment"))?;
        write!(page, "\n## {heading}\n\n{}\n\n", sentence(&comment))?;
        columns(&mut page, name, &world.session.query(COLUMNS, &[&name]).await?)?;
    }
    compare("functions.md", &page)
}

/// Arguments in lines of at most 110 letters.
fn wrapped(begin: &str, arguments: &str) -> String {
    let (mut lines, mut line) = (String::new(), begin.to_owned());
    for argument in arguments.split_inclusive(", ") {
        if line.len() + argument.len() > 110 {
            lines += line.trim_end();
            lines.push('\n');
            line = "    ".to_owned();
        }
        line += argument;
    }
    lines + &line
}

fn columns(page: &mut String, name: &str, rows: &[Row]) -> Result<()> {
    let has_defaults = rows.iter().any(|row| !row.get::<_, String>(2).is_empty());
    page.push_str(match has_defaults {
        true => "| column | type | default | |\n| --- | --- | --- | --- |\n",
        false => "| column | type | |\n| --- | --- | --- |\n",
    });
    for row in rows {
        let [column, kind, default, comment]: [String; 4] = std::array::from_fn(|column| row.get(column));
        ensure!(!comment.is_empty(), "{name}.{column} has no comment");
        let default = if has_defaults { format!(" {} |", code(&default)) } else { String::new() };
        writeln!(page, "| `{column}` | {kind} |{default} {} |", cell(&comment))?;
    }
    Ok(())
}

/// A flag as the help shows it: `--name <VALUE>  what it is [default: …] [env: …]`.
struct Flag {
    name: String,
    value: String,
    variable: String,
    default: String,
    what: String,
}

impl Flag {
    fn read(line: &str) -> Option<Self> {
        let (flag, text) = line.trim_start().strip_prefix("--")?.split_once("  ")?;
        let (name, value) = flag.split_once([' ', '[']).unwrap_or((flag, ""));
        let (mut what, mut variable, mut default) = (text.trim().to_owned(), String::new(), String::new());
        for (label, slot) in [("[env: ", &mut variable), ("[default: ", &mut default)] {
            if let Some(start) = what.find(label) {
                let end = what[start..].find(']')? + start;
                *slot = what[start + label.len()..end].to_owned();
                what = format!("{}{}", what[..start].trim_end(), &what[end + 1..]);
            }
        }
        let what = what.replace(" [possible values: ", ": ").replace(']', "");
        Some(Flag { name: name.to_owned(), value: value.trim_start_matches('=').to_owned(), variable, default, what })
    }

    /// Its key in the file; none if the relay knows no such key.
    fn key(&self) -> Result<String> {
        let key = self.name.replace('-', "_");
        let file = scratch::dir("toml")?.join("relay.toml");
        std::fs::write(&file, format!("{key} = {{ wrong = 1 }}\n"))?;
        let output = relay::command(None)?.arg("check").arg("--config").arg(&file).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let known = said.contains("a value of the wrong type") || said.contains("a value that is not allowed");
        match (known, said.contains("a key that is unknown")) {
            (true, false) => Ok(format!("`{key}`")),
            (false, true) => Ok(String::new()),
            _ => bail!("{key}: {said}"),
        }
    }
}

#[test]
fn the_flags_are_those_of_the_relay() -> Result<()> {
    let help = String::from_utf8(relay::command(None)?.args(["run", "--help"]).output()?.stdout)?;
    let mut flags: Vec<Flag> = help.lines().filter_map(Flag::read).collect();
    flags.sort_by(|a, b| a.name.cmp(&b.name));
    let expected = help.lines().filter(|line| line.trim_start().starts_with("--")).count();
    ensure!(flags.len() == expected && expected > 20, "{} of {expected} flags in\n{help}", flags.len());
    let mut page = String::from(
        "# Flags of the relay\n\n\
         Of `outbox-relay run` and `outbox-relay check`; [the relay](../relay.md) says what they mean together, and\n\
         [the commands](../commands.md) have flags of their own. A flag overrides the environment, and the environment\n\
         overrides the TOML file. `amqp_url` may also be a table `[amqp]`, with a URL for each broker's name.\n\n\
         | flag | environment | TOML key | default | |\n| --- | --- | --- | --- | --- |\n",
    );
    for flag in flags {
        ensure!(!flag.variable.is_empty() && !flag.what.is_empty(), "--{} is not explained", flag.name);
        let name = format!("--{} {}", flag.name, flag.value.trim_matches(['<', '>', ']', '=']));
        let default = if flag.default.is_empty() { "none" } else { &flag.default };
        let (name, variable, key) = (code(name.trim()), code(&flag.variable), flag.key()?);
        writeln!(page, "| {name} | {variable} | {key} | {default} | {} |", cell(&flag.what))?;
    }
    compare("relay.md", &page)
}

/// After a delivery and at a destination that it can't serve, so that the metrics of destinations are there as well.
#[tokio::test]
async fn the_metrics_are_those_of_a_relay() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("hook", &receiver.url("/"), "{}").await?;
    world.add_webhook("inside", "http://10.1.1.1/", "{}").await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT bool_or(state = 'open') FROM outbox.destinations WHERE name = 'inside'").await?;
    receiver.wait_for(1, LONG).await?;
    let look = async || {
        let (_, text) = relay.get("/metrics").await?;
        let there = text.contains("outbox_relay_unable{") && text.contains("outcome=\"delivered\"");
        Ok((there && text.contains("outbox_events_pending ")).then_some(text))
    };
    let text = wait::until("the metrics of destinations", LONG, look).await?;
    let mut page = String::from(
        "# Metrics\n\n\
         What `/metrics` of a relay shows, for Prometheus; [observability.md](../observability.md) says what to make of it.\n\
         `outbox_events_pending`, `_processing`, `_failed` and `_oldest_pending_seconds` are gauges of the whole database and\n\
         the same from each relay: take the highest, not the sum. They are left out while the database does not answer.\n\
         Scheduled events count as pending, but have no age until they are due. A\n\
         destination has metrics of its own from its first delivery until it is removed, as long as\n\
         `--metrics-destinations` have; the others are summed as `destination=\"other\"`. `outcome` is one of those of\n\
         [an attempt](../delivery.md#how-events-are-delivered).\n\n\
         | metric | type | |\n| --- | --- | --- |\n",
    );
    let help = |name: &str| text.lines().find_map(|line| line.strip_prefix(&format!("# HELP {name} ")));
    for (name, kind) in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')) {
        let what = help(name).with_context(|| format!("{name} has no help"))?;
        // A histogram's are those of its sum.
        let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split_once('}'));
        let labels = of(name).or_else(|| of(&format!("{name}_sum")));
        let labels: Vec<&str> = labels
            .map(|(labels, _)| labels.split(',').filter_map(|label| label.split('=').next()).collect())
            .unwrap_or_default();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        writeln!(page, "| `{name}{labels}` | {kind} | {} |", cell(what))?;
    }
    compare("metrics.md", &page)
}
