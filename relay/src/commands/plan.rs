//! What has to change so that the destinations are as a file wants them: decided here, without a database.
//!
//! A value that the database hides is shown as `…`. Where the file has `…` too, it is kept. Anything else in its place is a
//! change each time, because nobody can tell whether it is the same.

use serde_json::{Map, Value, json};

use super::file::{HIDDEN, Kind, Wanted, without_nulls};

/// One change of a destination that exists: where, from what, to what.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Such as `settings.timeout`.
    pub field: String,
    pub from: Value,
    pub to: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Add(Wanted),
    /// `patch`: a JSON Merge Patch for `outbox.alter_destination()`; null where nothing but the pause changes.
    Alter {
        name: String,
        changes: Vec<Change>,
        patch: Value,
        paused: Option<bool>,
    },
    Remove {
        name: String,
    },
}

#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Not in the file, and kept.
    pub kept: Vec<String>,
}

/// The steps, or the first thing of the file that can't be.
pub fn plan(present: &[Wanted], wanted: &[Wanted], prune: bool) -> Result<Plan, String> {
    let mut plan = Plan::default();
    for wanted in wanted {
        match present.iter().find(|present| present.name == wanted.name) {
            Some(present) => plan.steps.extend(alter(present, wanted)?),
            None => plan.steps.push(add(wanted)?),
        }
    }
    for present in present.iter().filter(|present| !wanted.iter().any(|wanted| wanted.name == present.name)) {
        match prune {
            true => plan.steps.push(Step::Remove { name: present.name.clone() }),
            false => plan.kept.push(present.name.clone()),
        }
    }
    Ok(plan)
}

fn add(wanted: &Wanted) -> Result<Step, String> {
    let mut wanted = wanted.clone();
    wanted.settings = settings_of(&wanted);
    if wanted.url.as_deref().is_some_and(is_hidden_url) {
        return Err(unknown(&wanted.name, "url"));
    }
    if let Some(path) = find_hidden(&wanted.settings, "settings") {
        return Err(unknown(&wanted.name, &path));
    }
    Ok(Step::Add(wanted))
}

fn unknown(name: &str, field: &str) -> String {
    format!("destination {name}: {field} holds …, which stands for a hidden value that there is not: write the value")
}

fn find_hidden(object: &Map<String, Value>, at: &str) -> Option<String> {
    object.iter().find_map(|(key, value)| {
        let path = format!("{at}.{key}");
        match value {
            Value::Object(inner) => find_hidden(inner, &path),
            value => (value == HIDDEN).then_some(path),
        }
    })
}

/// A URL whose query is hidden.
fn is_hidden_url(url: &str) -> bool {
    url.ends_with("?…")
}

fn alter(present: &Wanted, wanted: &Wanted) -> Result<Option<Step>, String> {
    if present.kind != wanted.kind {
        return Err(format!(
            "destination {} is a {}, and the file wants a {}: remove it first, or choose another name",
            present.name,
            present.kind.name(),
            wanted.kind.name()
        ));
    }
    let (mut changes, mut patch) = (Vec::new(), Map::new());
    let (old, new) = (fields(present), fields(wanted));
    for (key, to) in new {
        let from = old.get(&key).cloned().unwrap_or_default();
        if from == to {
            continue;
        }
        if key == "url" && to.as_str().is_some_and(is_hidden_url) {
            return Err(unknown(&wanted.name, "url"));
        }
        patch.insert(key.clone(), to.clone());
        changes.push(Change { field: key, from, to });
    }
    let settings = settings_of(wanted);
    let merged = merge(&present.settings, &settings, "settings", &mut changes);
    if let Some(merged) = merged.map_err(|path| unknown(&wanted.name, &path))? {
        patch.insert("settings".into(), Value::Object(merged));
    }
    let paused = wanted.paused.filter(|paused| *paused != present.paused.unwrap_or(false));
    if let Some(paused) = paused {
        changes.push(Change { field: "paused".into(), from: json!(!paused), to: json!(paused) });
    }
    if changes.is_empty() {
        return Ok(None);
    }
    let patch = if patch.is_empty() { Value::Null } else { Value::Object(patch) };
    Ok(Some(Step::Alter { name: wanted.name.clone(), changes, patch, paused }))
}

/// All but name, kind, pause and settings, with the defaults of what is left out.
fn fields(of: &Wanted) -> Map<String, Value> {
    let mut fields = Map::new();
    match of.kind {
        Kind::Webhook => drop(fields.insert("url".into(), json!(of.url))),
        Kind::RabbitMq => {
            fields.insert("exchange".into(), json!(of.exchange.as_deref().unwrap_or("outbox_events")));
            fields.insert("routing_key".into(), json!(of.routing_key.as_deref().unwrap_or("{event_type}")));
        }
    }
    fields.insert("event_types".into(), json!(of.event_types.clone().unwrap_or(vec!["*".into()])));
    fields.insert("tenant_id".into(), json!(of.tenant_id));
    fields.insert("filter".into(), json!(of.filter));
    fields
}

fn settings_of(of: &Wanted) -> Map<String, Value> {
    let mut settings = Value::Object(of.settings.clone());
    without_nulls(&mut settings);
    match settings {
        Value::Object(settings) => settings,
        _ => Map::new(),
    }
}

/// The merge patch from one object to the other, and its changes; `Err`: where `…` stands for nothing.
fn merge(
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    at: &str,
    changes: &mut Vec<Change>,
) -> Result<Option<Map<String, Value>>, String> {
    let mut patch = Map::new();
    for (key, to) in new {
        let field = format!("{at}.{key}");
        match (old.get(key), to) {
            (Some(from), to) if from == to => {}
            (Some(Value::Object(from)), Value::Object(to)) => {
                let inner = merge(from, to, &field, changes)?;
                patch.extend(inner.map(|inner| (key.clone(), Value::Object(inner))));
            }
            (from, to) => {
                let hidden = to.as_object().and_then(|to| find_hidden(to, &field));
                match hidden.or((to == HIDDEN).then_some(field.clone())) {
                    Some(path) => return Err(path),
                    None => patch.insert(key.clone(), to.clone()),
                };
                changes.push(Change { field, from: from.cloned().unwrap_or_default(), to: to.clone() });
            }
        }
    }
    for (key, from) in old.iter().filter(|(key, _)| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
        changes.push(Change { field: format!("{at}.{key}"), from: from.clone(), to: Value::Null });
    }
    Ok((!patch.is_empty()).then_some(patch))
}

impl Step {
    /// For people, a line for each change.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Step::Add(wanted) => {
                let exchange = || wanted.exchange.clone().unwrap_or("outbox_events".into());
                let to = wanted.url.as_deref().map_or_else(exchange, shown_url);
                let types = wanted.event_types.clone().unwrap_or(vec!["*".into()]).join(",");
                vec![format!("+ {}: {} {to}, types {types}", wanted.name, wanted.kind.name())]
            }
            Step::Alter { name, changes, .. } => {
                let line = |change: &Change| {
                    let [from, to] = [&change.from, &change.to].map(|value| shown(&change.field, value).to_string());
                    format!("~ {name}: {} {from} -> {to}", change.field)
                };
                changes.iter().map(line).collect()
            }
            Step::Remove { name } => vec![format!("- {name}: removed with all that it is owed")],
        }
    }

    /// The same for programs.
    pub fn json(&self) -> Vec<Value> {
        match self {
            Step::Add(wanted) => vec![json!({"action": "add", "name": wanted.name})],
            Step::Alter { name, changes, .. } => {
                let change = |change: &Change| {
                    let [from, to] = [&change.from, &change.to].map(|value| shown(&change.field, value));
                    json!({"action": "change", "name": name, "field": change.field, "from": from, "to": to})
                };
                changes.iter().map(change).collect()
            }
            Step::Remove { name } => vec![json!({"action": "remove", "name": name})],
        }
    }
}

/// A value as the view would show it: what is hidden there shows here as little.
fn shown(field: &str, value: &Value) -> Value {
    match (field, value) {
        (_, Value::Null) => Value::Null,
        ("url", Value::String(url)) => json!(shown_url(url)),
        ("settings.headers", Value::Object(headers)) => {
            headers.keys().map(|name| (name.clone(), json!(HIDDEN))).collect()
        }
        _ if field.starts_with("settings.headers") || field.starts_with("settings.client_key") => json!(HIDDEN),
        // A proxy's URL may hold a login.
        (_, Value::String(text)) if text.contains("://") && text.contains('@') => json!(HIDDEN),
        (_, value) => value.clone(),
    }
}

fn shown_url(url: &str) -> String {
    match url.split_once('?') {
        // No URL of a webhook may hold a login, and this one is refused.
        None if url.contains('@') => HIDDEN.into(),
        Some((front, _)) if front.contains('@') => HIDDEN.into(),
        Some((front, _)) => format!("{front}?…"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn webhook(name: &str, rest: Value) -> Wanted {
        let mut all = json!({"name": name, "kind": "webhook", "url": "https://example.com/hook?…"});
        all.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    fn one(present: &Wanted, wanted: &Wanted) -> Result<Plan, String> {
        plan(std::slice::from_ref(present), std::slice::from_ref(wanted), false)
    }

    #[test]
    fn what_is_the_same_is_no_step_and_hidden_values_are() {
        let present = webhook("crm", json!({"event_types": ["*"], "settings": {"headers": {"x": "…"}, "timeout": 2}}));
        let wanted = webhook("crm", json!({"settings": {"headers": {"x": "…"}, "timeout": 2, "base": null}}));
        assert_eq!(one(&present, &wanted), Ok(Plan::default()));
    }

    #[test]
    fn a_change_is_a_merge_patch_of_what_differs() {
        let present = webhook(
            "crm",
            json!({"tenant_id": "a", "settings": {"headers": {"x": "…", "y": "…"}, "timeout": 2, "base": 1}}),
        );
        let wanted = webhook(
            "crm",
            json!({"event_types": ["a.*"], "paused": true,
                   "settings": {"headers": {"x": "…", "z": "hunter2"}, "timeout": 3}}),
        );
        let Ok(Plan { steps, .. }) = one(&present, &wanted) else { panic!() };
        let [step @ Step::Alter { patch, paused, .. }] = &steps[..] else { panic!("{steps:?}") };
        assert_eq!(
            *patch,
            json!({"event_types": ["a.*"], "tenant_id": null,
                   "settings": {"headers": {"y": null, "z": "hunter2"}, "timeout": 3, "base": null}})
        );
        assert_eq!(*paused, Some(true));
        assert_eq!(
            step.lines(),
            [
                "~ crm: event_types [\"*\"] -> [\"a.*\"]",
                "~ crm: tenant_id \"a\" -> null",
                "~ crm: settings.headers.z null -> \"…\"",
                "~ crm: settings.headers.y \"…\" -> null",
                "~ crm: settings.timeout 2 -> 3",
                "~ crm: settings.base 1 -> null",
                "~ crm: paused false -> true",
            ]
        );
        assert!(!Value::from(step.json()).to_string().contains("hunter2"));
    }

    #[test]
    fn what_is_not_in_the_file_goes_only_when_asked_for() {
        let present = [webhook("old", json!({}))];
        assert_eq!(plan(&present, &[], false), Ok(Plan { steps: Vec::new(), kept: vec!["old".into()] }));
        let pruned = Plan { steps: vec![Step::Remove { name: "old".into() }], kept: Vec::new() };
        assert_eq!(plan(&present, &[], true), Ok(pruned));
    }

    #[test]
    fn a_hidden_value_that_there_is_not_is_an_error() {
        let present = webhook("crm", json!({}));
        for wanted in [
            webhook("crm", json!({"settings": {"headers": {"x": "…"}}})),
            webhook("crm", json!({"url": "https://other.example.com/?…"})),
            webhook("new", json!({})),
            webhook("new", json!({"url": "https://example.com/", "settings": {"client_key": "…"}})),
        ] {
            let error = one(&present, &wanted).expect_err("hidden");
            assert!(error.contains("stands for a hidden value"), "{error}");
        }
    }

    #[test]
    fn an_operators_pause_stays_when_the_file_says_nothing_of_it() {
        let present = webhook("crm", json!({"paused": true}));
        assert_eq!(one(&present, &webhook("crm", json!({}))), Ok(Plan::default()));
        let Ok(Plan { steps, .. }) = one(&present, &webhook("crm", json!({"paused": false}))) else { panic!() };
        assert!(matches!(&steps[..], [Step::Alter { patch: Value::Null, paused: Some(false), .. }]), "{steps:?}");
    }

    #[test]
    fn a_new_destination_is_a_line_without_its_query_and_headers() {
        let new = webhook(
            "crm",
            json!({"url": "https://x.example/?token=hunter2", "settings": {"headers": {"a": "hunter2"}}}),
        );
        let Ok(Plan { steps, .. }) = plan(&[], &[new], false) else { panic!() };
        assert_eq!(steps[0].lines(), ["+ crm: webhook https://x.example/?…, types *"]);
    }
}
