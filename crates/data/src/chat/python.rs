//! What chat templates take from Python and minijinja does not have: how values are printed, `'…' % x`, methods of strings and
//! mappings, the functions that transformers hands to templates.
//!
//! Must not know: messages, tokenizers, files.

use std::fmt::Write;

use chrono::{DateTime, Local};
use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Filter that stands for `'…' % x`.
const PERCENT: &str = "python_percent";

/// Teaches an environment; `now` is what templates that write the date are told, each time.
pub(super) fn teach(env: &mut Environment<'static>, now: DateTime<Local>) {
    env.set_formatter(|out, _, value| Ok(write!(out, "{}", text(value))?));
    env.set_unknown_method_callback(method);
    env.add_filter(PERCENT, percent);
    env.add_filter("string", |value: &Value| text(value));
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<String, Error> { Err(refuse(message)) });
    env.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let mut out = String::new();
        match write!(out, "{}", now.format(&format)) {
            Ok(()) => Ok(out),
            Err(_) => Err(refuse(format!("strftime_now: {format:?} is no format of a date"))),
        }
    });
}

fn refuse(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// As `str` writes a value.
fn text(value: &Value) -> String {
    match value.as_str() {
        Some(s) => s.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// As `repr` writes a value.
fn repr(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::None | ValueKind::Undefined => "None".to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            format!("[{}]", join(value.try_iter().into_iter().flatten().map(|v| repr(&v)).collect()))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            format!("{{{}}}", join(value.try_iter().into_iter().flatten().map(pair).collect()))
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `json.dumps` as transformers calls it: no escapes for HTML, a blank behind commas and colons.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for key in ["ensure_ascii", "separators", "sort_keys"] {
        if options.has(key) && options.get::<Value>(key)?.is_true() {
            return Err(refuse(format!("tojson: `{key}` is not supported")));
        }
    }
    options.assert_all_used()?;
    let mut out = String::new();
    json(value, indent, 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let (open, close) = match value.kind() {
        ValueKind::Map => ('{', '}'),
        ValueKind::Seq => ('[', ']'),
        _ => {
            out.push_str(&serde_json::to_string(value).map_err(|e| refuse(format!("tojson: {e}")))?);
            return Ok(());
        }
    };
    out.push(open);
    let mut empty = true;
    for item in value.try_iter()? {
        if !empty {
            out.push_str(comma);
        }
        empty = false;
        line(out, depth + 1);
        if open == '{' {
            out.push_str(&serde_json::to_string(&text(&item)).map_err(|e| refuse(format!("tojson: {e}")))?);
            out.push_str(": ");
            json(&value.get_item(&item)?, indent, depth + 1, out)?;
        } else {
            json(&item, indent, depth + 1, out)?;
        }
    }
    if !empty {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

/// `format % arguments`.
fn percent(state: &State<'_, '_>, format: &str, arguments: Rest<Value>) -> Result<Value, Error> {
    let by_name = format.contains("%(");
    let plain = |v: &Value| match v.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq => Value::from(text(v)),
        ValueKind::Map if !by_name => Value::from(text(v)),
        _ => v.clone(),
    };
    let mut all = vec![Value::from(format)];
    all.extend(arguments.iter().map(plain));
    state.apply_filter("format", &all)
}

/// Methods that Python's values have and pycompat lacks.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map && name == "get" && args.len() == 2 {
        let found = value.get_item(&args[0])?;
        return Ok(if found.is_undefined() { args[1].clone() } else { found });
    }
    let Some(s) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    let one = || -> Result<String, Error> { from_args::<(String,)>(args).map(|(a,)| a) };
    let parts = |found: Option<(&str, &str)>, at: &str, last: bool| {
        let all = match (found, last) {
            (Some((a, b)), _) => [a, at, b],
            (None, false) => [s, "", ""],
            (None, true) => ["", "", s],
        };
        Value::from(all.map(Value::from).to_vec())
    };
    Ok(match name {
        "removeprefix" => Value::from(s.strip_prefix(one()?.as_str()).unwrap_or(s)),
        "removesuffix" => Value::from(s.strip_suffix(one()?.as_str()).unwrap_or(s)),
        "partition" => {
            let at = one()?;
            parts(s.split_once(at.as_str()), &at, false)
        }
        "rpartition" => {
            let at = one()?;
            parts(s.rsplit_once(at.as_str()), &at, true)
        }
        "casefold" => Value::from(s.to_lowercase()),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// The template with each `'…' % operand` written as a filter, for minijinja's `%` knows numbers alone.
pub(super) fn without_percent(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let (end, code) = match rest.as_bytes().get(open + 1) {
            Some(b'#') => (rest[open..].find("#}").map(|i| open + i + 2), false),
            Some(b'{') => (code_end(rest, open + 2, "}}"), true),
            Some(b'%') => (code_end(rest, open + 2, "%}"), true),
            _ => (Some(open + 1), false),
        };
        let end = end.unwrap_or(rest.len());
        out.push_str(&rest[..open]);
        let block = &rest[open..end];
        if code {
            rewrite(block, &mut out)
        } else {
            out.push_str(block)
        }
        rest = &rest[end..];
        if code && is_tag(block, "raw") {
            let raw = raw_end(rest);
            out.push_str(&rest[..raw]);
            rest = &rest[raw..];
        }
    }
    out.push_str(rest);
    out
}

fn is_tag(block: &str, name: &str) -> bool {
    let inner = block.strip_prefix("{%").and_then(|b| b.strip_suffix("%}"));
    inner.is_some_and(|b| b.trim_matches(['-', '+']).trim() == name)
}

/// Where `{% endraw %}` begins.
fn raw_end(text: &str) -> usize {
    let mut at = 0;
    while let Some(i) = text[at..].find("{%").map(|i| at + i) {
        let end = text[i..].find("%}").map_or(text.len(), |e| i + e + 2);
        if is_tag(&text[i..end], "endraw") {
            return i;
        }
        at = end;
    }
    text.len()
}

/// Behind the end of a block of code, which may hold texts and brackets.
fn code_end(text: &str, mut at: usize, close: &str) -> Option<usize> {
    let mut depth = 0usize;
    while at < text.len() {
        if depth == 0 && text[at..].starts_with(close) {
            return Some(at + close.len());
        }
        match text.as_bytes()[at] {
            b'\'' | b'"' => {
                at = literal_end(text, at)?;
                continue;
            }
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
        while !text.is_char_boundary(at) {
            at += 1;
        }
    }
    None
}

/// Behind the text that begins at `at`.
fn literal_end(text: &str, at: usize) -> Option<usize> {
    let quote = text.as_bytes()[at];
    let mut bytes = text.as_bytes().iter().enumerate().skip(at + 1);
    while let Some((i, b)) = bytes.next() {
        match b {
            b'\\' => _ = bytes.next(),
            b if *b == quote => return Some(i + 1),
            _ => {}
        }
    }
    None
}

fn rewrite(block: &str, out: &mut String) {
    let (mut at, mut copied) = (0, 0);
    while let Some(begin) = block[at..].find(['\'', '"']).map(|i| at + i) {
        let Some(end) = literal_end(block, begin) else { break };
        at = end;
        let sign = blank(block, end);
        if !block[sign..].starts_with('%') || block[sign..].starts_with("%}") {
            continue;
        }
        let from = blank(block, sign + 1);
        let Some((to, bare)) = operand(block, from) else { continue };
        let given = &block[from..to];
        let inner = given.strip_prefix('(').and_then(|g| g.strip_suffix(')')).filter(|_| bare);
        let list = inner.filter(|i| has_comma(i)).map(|i| i.trim_end().trim_end_matches(','));
        out.push_str(&block[copied..end]);
        out.push_str(&format!("|{PERCENT}({})", without_percent_in(list.unwrap_or(given))));
        (at, copied) = (to, to);
    }
    out.push_str(&block[copied..]);
}

/// An operand may hold such an expression itself.
fn without_percent_in(expression: &str) -> String {
    let mut out = String::new();
    rewrite(expression, &mut out);
    out
}

fn blank(text: &str, at: usize) -> usize {
    at + text[at..].len() - text[at..].trim_start().len()
}

/// Behind the operand that begins at `at`, with what is read, called or filtered of it; and whether it is one pair of brackets alone.
fn operand(text: &str, at: usize) -> Option<(usize, bool)> {
    let word = |from: usize| {
        let len = text[from..].find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len() - from);
        (len > 0).then_some(from + len)
    };
    let at = if text[at..].starts_with(['-', '+']) { blank(text, at + 1) } else { at };
    let mut bare = text[at..].starts_with('(');
    let mut end = match text.as_bytes().get(at)? {
        b'\'' | b'"' => literal_end(text, at)?,
        b'(' | b'[' | b'{' => bracket_end(text, at)?,
        _ => word(at)?,
    };
    loop {
        let next = blank(text, end);
        end = match text.as_bytes().get(next) {
            Some(b'.') => word(next + 1)?,
            Some(b'[' | b'(') => bracket_end(text, next)?,
            Some(b'|') => word(blank(text, next + 1))?,
            _ => return Some((end, bare)),
        };
        bare = false;
    }
}

/// Behind the bracket that closes the one at `at`.
fn bracket_end(text: &str, at: usize) -> Option<usize> {
    let close = match text.as_bytes()[at] {
        b'(' => ")",
        b'[' => "]",
        _ => "}",
    };
    code_end(text, at + 1, close)
}

fn has_comma(text: &str) -> bool {
    code_end(text, 0, ",").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let mut env = Environment::new();
        teach(&mut env, DateTime::parse_from_rfc3339("2024-07-26T09:05:00Z").unwrap().into());
        let x = serde_json::json!({"d": {"a": 1, "none": null}, "l": ["x", true, null, "it's"], "n": 3, "t": "ab"});
        env.render_str(&without_percent(source), x)
    }

    #[test]
    fn percent_is_rewritten_where_it_belongs_to_a_text() {
        for (source, want) in [
            ("{{ '%s and %s' % (t, n) }}", "ab and 3"),
            ("{{ '<%s>' % t ~ '!' }}", "<ab>!"),
            ("{{ \"%s\" % l[0]|upper }}", "X"),
            ("{{ '%s' % d.get('b', '%d' % n) }}", "3"),
            ("{{ '%(a)s' % d }}", "1"),
            ("{{ '%s %s' % (none, true) }}", "None True"),
            ("{% set x = '%05.2f' % 3.14159 %}{{ x }}", "03.14"),
            ("{{ n % 2 }} {{ '%' }}{# '%s' % t #}{% raw %}{{ '%s' % t }}{% endraw %}", "1 %{{ '%s' % t }}"),
            ("{% if t == 'ab' %}'%s' % t{% endif %}", "'%s' % t"),
            ("{{ '%s' % ('é' ~ '}}') }}", "é}}"),
        ] {
            assert_eq!(render(source).unwrap(), want, "{source}");
        }
        assert!(render("{{ '%s %s' % t }}").is_err());
    }

    #[test]
    fn values_print_as_in_python() {
        for (source, want) in [
            ("{{ l }}", "['x', True, None, \"it's\"]"),
            ("{{ d }} {{ missing }}{{ none }}", "{'a': 1, 'none': None} None"),
            (
                "{{ l|tojson }}{{ d|tojson(indent=2) }}",
                "[\"x\", true, null, \"it's\"]{\n  \"a\": 1,\n  \"none\": null\n}",
            ),
            ("{{ '<a>'|tojson }} {{ 1.0 }} {{ true|string }}", "\"<a>\" 1.0 True"),
            ("{{ d.get('a', 7) }}{{ d.get('z', 7) }}{{ d.get('none', 7) }}{{ d.get('z') }}", "17NoneNone"),
            ("{{ t.removeprefix('a') }}{{ t.removesuffix('x') }}{{ 'a-b'.partition('-')[2] }}", "babb"),
            ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ] {
            assert_eq!(render(source).unwrap(), want, "{source}");
        }
        assert!(render("{{ strftime_now('%Q') }}").unwrap_err().to_string().contains("%Q"));
    }
}
