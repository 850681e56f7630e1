//! Python features that chat templates use and minijinja lacks: formatting of values, `'…' % x`, methods of strings and mappings, and the
//! functions that transformers provides to templates.

use std::fmt::Write;

use chrono::{DateTime, Local};
use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Name of the filter that replaces `'…' % x`.
const PERCENT_FILTER: &str = "python_percent";

/// Installs these features in an environment; `now` is the date that every rendering uses.
pub(super) fn install(env: &mut Environment<'static>, now: DateTime<Local>) {
    env.set_formatter(|out, _, value| Ok(write!(out, "{}", text(value))?));
    env.set_unknown_method_callback(method);
    env.add_filter(PERCENT_FILTER, percent);
    env.add_filter("string", |value: &Value| text(value));
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<String, Error> { Err(invalid(message)) });
    env.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let mut out = String::new();
        match write!(out, "{}", now.format(&format)) {
            Ok(()) => Ok(out),
            Err(_) => Err(invalid(format!("strftime_now: {format:?} is not a valid date format"))),
        }
    });
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// Formats a value as Python's `str` does.
fn text(value: &Value) -> String {
    match value.as_str() {
        Some(s) => s.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// Formats a value as Python's `repr` does.
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

/// Formats a value as `json.dumps` does when called by transformers: no HTML escapes, a space after commas and colons.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for key in ["ensure_ascii", "separators", "sort_keys"] {
        if options.has(key) && options.get::<Value>(key)?.is_true() {
            return Err(invalid(format!("tojson: `{key}` is not supported")));
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
            out.push_str(&serde_json::to_string(value).map_err(|e| invalid(format!("tojson: {e}")))?);
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
            out.push_str(&serde_json::to_string(&text(&item)).map_err(|e| invalid(format!("tojson: {e}")))?);
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

/// Evaluates `format % arguments`.
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

/// Calls a method that Python values have and pycompat lacks.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map && name == "get" && args.len() == 2 {
        let item = value.get_item(&args[0])?;
        return Ok(if item.is_undefined() { args[1].clone() } else { item });
    }
    let Some(s) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    let argument = || -> Result<String, Error> { from_args::<(String,)>(args).map(|(a,)| a) };
    let parts = |halves: Option<(&str, &str)>, separator: &str, from_end: bool| {
        let all = match (halves, from_end) {
            (Some((a, b)), _) => [a, separator, b],
            (None, false) => [s, "", ""],
            (None, true) => ["", "", s],
        };
        Value::from(all.map(Value::from).to_vec())
    };
    Ok(match name {
        "removeprefix" => Value::from(s.strip_prefix(argument()?.as_str()).unwrap_or(s)),
        "removesuffix" => Value::from(s.strip_suffix(argument()?.as_str()).unwrap_or(s)),
        "partition" => {
            let separator = argument()?;
            parts(s.split_once(separator.as_str()), &separator, false)
        }
        "rpartition" => {
            let separator = argument()?;
            parts(s.rsplit_once(separator.as_str()), &separator, true)
        }
        "casefold" => Value::from(s.to_lowercase()),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// Rewrites each `'…' % operand` of a template as a filter, because `%` in minijinja accepts only numbers.
pub(super) fn rewrite_percent_operators(source: &str) -> String {
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
            rewrite_block(block, &mut out)
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

/// Returns the position of `{% endraw %}`.
fn raw_end(text: &str) -> usize {
    let mut position = 0;
    while let Some(i) = text[position..].find("{%").map(|i| position + i) {
        let end = text[i..].find("%}").map_or(text.len(), |e| i + e + 2);
        if is_tag(&text[i..end], "endraw") {
            return i;
        }
        position = end;
    }
    text.len()
}

/// Returns the position after the end of a code block, which may contain string literals and brackets.
fn code_end(text: &str, mut position: usize, close: &str) -> Option<usize> {
    let mut depth = 0usize;
    while position < text.len() {
        if depth == 0 && text[position..].starts_with(close) {
            return Some(position + close.len());
        }
        match text.as_bytes()[position] {
            b'\'' | b'"' => {
                position = literal_end(text, position)?;
                continue;
            }
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        position += 1;
        while !text.is_char_boundary(position) {
            position += 1;
        }
    }
    None
}

/// Returns the position after the string literal that begins at `position`.
fn literal_end(text: &str, position: usize) -> Option<usize> {
    let quote = text.as_bytes()[position];
    let mut bytes = text.as_bytes().iter().enumerate().skip(position + 1);
    while let Some((i, b)) = bytes.next() {
        match b {
            b'\\' => _ = bytes.next(),
            b if *b == quote => return Some(i + 1),
            _ => {}
        }
    }
    None
}

/// Appends a code block with its percent operators rewritten.
fn rewrite_block(block: &str, out: &mut String) {
    let mut position = 0;
    let mut copied = 0;
    while let Some(begin) = block[position..].find(['\'', '"']).map(|i| position + i) {
        let Some(end) = literal_end(block, begin) else { break };
        position = end;
        let sign = skip_blanks(block, end);
        if !block[sign..].starts_with('%') || block[sign..].starts_with("%}") {
            continue;
        }
        let from = skip_blanks(block, sign + 1);
        let Some((to, bare)) = operand(block, from) else { continue };
        let argument = &block[from..to];
        let inner = argument.strip_prefix('(').and_then(|g| g.strip_suffix(')')).filter(|_| bare);
        let list = inner.filter(|i| has_comma(i)).map(|i| i.trim_end().trim_end_matches(','));
        out.push_str(&block[copied..end]);
        out.push_str(&format!("|{PERCENT_FILTER}({})", rewrite_expression(list.unwrap_or(argument))));
        (position, copied) = (to, to);
    }
    out.push_str(&block[copied..]);
}

/// Rewrites the percent operators within an operand.
fn rewrite_expression(expression: &str) -> String {
    let mut out = String::new();
    rewrite_block(expression, &mut out);
    out
}

fn skip_blanks(text: &str, position: usize) -> usize {
    position + text[position..].len() - text[position..].trim_start().len()
}

/// Returns the position after the operand that begins at `position`, including attributes, calls and filters, and whether it is a single pair
/// of brackets.
fn operand(text: &str, position: usize) -> Option<(usize, bool)> {
    let word = |from: usize| {
        let len = text[from..].find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len() - from);
        (len > 0).then_some(from + len)
    };
    let position = if text[position..].starts_with(['-', '+']) { skip_blanks(text, position + 1) } else { position };
    let mut bare = text[position..].starts_with('(');
    let mut end = match text.as_bytes().get(position)? {
        b'\'' | b'"' => literal_end(text, position)?,
        b'(' | b'[' | b'{' => bracket_end(text, position)?,
        _ => word(position)?,
    };
    loop {
        let next = skip_blanks(text, end);
        end = match text.as_bytes().get(next) {
            Some(b'.') => word(next + 1)?,
            Some(b'[' | b'(') => bracket_end(text, next)?,
            Some(b'|') => word(skip_blanks(text, next + 1))?,
            _ => return Some((end, bare)),
        };
        bare = false;
    }
}

/// Returns the position after the bracket that closes the one at `position`.
fn bracket_end(text: &str, position: usize) -> Option<usize> {
    let close = match text.as_bytes()[position] {
        b'(' => ")",
        b'[' => "]",
        _ => "}",
    };
    code_end(text, position + 1, close)
}

fn has_comma(text: &str) -> bool {
    code_end(text, 0, ",").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let mut env = Environment::new();
        install(&mut env, DateTime::parse_from_rfc3339("2024-07-26T09:05:00Z").unwrap().into());
        let x = serde_json::json!({"d": {"a": 1, "none": null}, "l": ["x", true, null, "it's"], "n": 3, "t": "ab"});
        env.render_str(&rewrite_percent_operators(source), x)
    }

    #[test]
    fn percent_after_a_string_is_rewritten() {
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
