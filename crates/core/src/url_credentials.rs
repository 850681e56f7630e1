//! Credentials inside URLs: before the host, and in the query. Configurations that contain them are refused, and they are redacted from
//! every message that quotes a URL.

use std::borrow::Cow;

/// Replacement for a credential.
const HIDDEN: &str = "***";

/// Names of parameters that are credentials.
const CREDENTIAL_NAMES: [&str; 10] = ["auth", "bearer", "code", "jwt", "key", "pass", "pwd", "sas", "sid", "sig"];
/// Substrings of the names of parameters that are credentials; compared without `-`, `_` and `.`.
const CREDENTIAL_SUBSTRINGS: [&str; 9] =
    ["accesskey", "apikey", "authorization", "credential", "passwd", "password", "secret", "signature", "token"];

/// Returns the name of the first credential in the URLs of a text: `user:password@`, or the name of a query parameter.
///
/// # Examples
/// ```
/// assert_eq!(unveil_core::find_url_credential("https://host/a?api-version=1&sig=abc").as_deref(), Some("sig"));
/// assert_eq!(unveil_core::find_url_credential("https://host/a?version=1"), None);
/// ```
pub fn find_url_credential(text: &str) -> Option<String> {
    urls(text).find_map(|url| {
        let user = user_info(url).map(|_| "user:password@".to_owned());
        user.or_else(|| parameters(url).find(|(name, _)| is_credential(name)).map(|(name, _)| name.to_owned()))
    })
}

/// Replaces every credential in the URLs of a text.
pub(crate) fn redact_urls(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let start = text.as_ptr() as usize;
    let mut hidden: Vec<(usize, usize)> = Vec::new();
    for url in urls(text) {
        let credentials =
            user_info(url).into_iter().chain(parameters(url).filter(|(n, _)| is_credential(n)).map(|(_, v)| v));
        hidden.extend(credentials.filter(|v| !v.is_empty()).map(|v| (v.as_ptr() as usize - start, v.len())));
    }
    if hidden.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (offset, length) in hidden {
        out.push_str(&text[done..offset]);
        out.push_str(HIDDEN);
        done = offset + length;
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

/// Returns the rest of each URL after `scheme://`, up to the first character that ends a URL in running text.
fn urls(text: &str) -> impl Iterator<Item = &str> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let begin = from + text[from..].find("://")? + 3;
        let rest = &text[begin..];
        let end =
            rest.find(|c: char| c.is_whitespace() || c.is_control() || "\"'`<>".contains(c)).unwrap_or(rest.len());
        from = begin + end;
        Some(&rest[..end])
    })
}

/// Returns the user information before the `@` of the host (RFC 3986, section 3.2.1).
fn user_info(url: &str) -> Option<&str> {
    let authority = &url[..url.find(['/', '?', '#', '\\']).unwrap_or(url.len())];
    authority.rsplit_once('@').map(|(user, _)| user)
}

/// Returns the names and values in the query and the fragment.
fn parameters(url: &str) -> impl Iterator<Item = (&str, &str)> {
    let query = url.find(['?', '#']).map_or("", |at| &url[at + 1..]);
    query.split(['&', ';', '?', '#']).filter_map(|pair| pair.split_once('='))
}

fn is_credential(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace(['-', '_', '.'], "");
    CREDENTIAL_NAMES.contains(&name.as_str()) || CREDENTIAL_SUBSTRINGS.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_by_position_or_name() {
        for (text, name) in [
            ("https://me:pw@host/v1", "user:password@"),
            ("s3://key@bucket/a", "user:password@"),
            ("https://host/v1?token=abc", "token"),
            ("https://host?a=1&sig=abc", "sig"),
            ("https://host/x?X-Amz-Security-Token=abc", "X-Amz-Security-Token"),
            ("https://host/x?AWSAccessKeyId=AK", "AWSAccessKeyId"),
            ("https://host/x?api_key=abc", "api_key"),
            ("https://host/x#access_token=abc", "access_token"),
            ("see http://ok/ and http://host?key=1", "key"),
        ] {
            assert_eq!(find_url_credential(text).as_deref(), Some(name), "{text}");
        }
        for text in
            ["https://host:1/v1/@me", "http://[::1]:80/?version=2&monkey=3", "a@b?token=1", "s3://bucket/a@b", ""]
        {
            assert_eq!(find_url_credential(text), None, "{text}");
        }
    }

    #[test]
    fn redaction_replaces_only_credentials() {
        for (text, clean) in [
            ("GET https://me:pw@host:1/a?b=1", "GET https://***@host:1/a?b=1"),
            ("\"https://h/a?sig=a%2Fb&se=2030&token=x\": 403", "\"https://h/a?sig=***&se=2030&token=***\": 403"),
            ("http://a/?key= and http://b?pwd=é", "http://a/?key= and http://b?pwd=***"),
        ] {
            assert_eq!(redact_urls(text), clean);
        }
        for text in ["https://host/a?b=1", "token=abc", "://", "a ://@"] {
            assert!(matches!(redact_urls(text), Cow::Borrowed(_)), "{text}");
        }
    }
}
