//! S3 credentials from AWS's own files, with a prompt error if there are none.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ini::{Ini, ParseOption};

/// Timeout of connecting to the instance's metadata service, which is one hop away.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
const METADATA_ADDRESS: &str = "169.254.169.254:80";
/// Advice for errors about missing credentials.
const ADVICE: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (`eval $(aws configure export-credentials --format env)` does so \
                      from any profile), name a profile with keys by AWS_PROFILE, or run where the instance has a role";
/// Keys of profiles that need a program or a service to obtain credentials.
const UNSUPPORTED_KEYS: [&str; 4] = ["sso_session", "sso_start_url", "credential_process", "role_arn"];

/// Options as lower-case names and values.
type Options = Vec<(String, String)>;

fn option<'a>(options: &'a Options, name: &str) -> Option<&'a str> {
    options.iter().find(|(k, v)| k == name && !v.is_empty()).map(|(_, v)| v.as_str())
}

/// Returns whether the options contain credentials, or disable signing.
fn has_credentials(options: &Options) -> bool {
    let has = |name: &str| option(options, name).is_some();
    has("aws_access_key_id")
        || has("aws_secret_access_key")
        || (has("aws_web_identity_token_file") && has("aws_role_arn"))
        || has("aws_container_credentials_relative_uri")
        || (has("aws_container_credentials_full_uri") && has("aws_container_authorization_token_file"))
        || option(options, "aws_skip_signature").is_some_and(|v| matches!(v, "true" | "1" | "yes" | "on" | "y"))
}

/// Adds the credentials, region and endpoint of the profile `AWS_PROFILE` (default: `default`) if the options have no credentials.
/// Like the AWS command line, reads them from `AWS_SHARED_CREDENTIALS_FILE` (`~/.aws/credentials`) and `AWS_CONFIG_FILE` (`~/.aws/config`).
///
/// # Errors
/// Returns a text that says what is missing or unsupported, and what to do.
pub(crate) async fn add_credentials(options: &mut Options) -> Result<(), String> {
    if has_credentials(options) {
        return Ok(());
    }
    let home = option(options, "home").map(PathBuf::from);
    let path = |variable: &str, file: &str| {
        option(options, variable).map(PathBuf::from).or_else(|| Some(home.as_ref()?.join(".aws").join(file)))
    };
    let requested =
        option(options, "aws_profile").or_else(|| option(options, "aws_default_profile")).map(str::to_owned);
    let profile = requested.clone().unwrap_or_else(|| "default".to_owned());
    let files = [path("aws_shared_credentials_file", "credentials"), path("aws_config_file", "config")];
    let mut entries = Options::new();
    for file in files.iter().flatten() {
        for (key, value) in read_profile(file, &profile)? {
            if option(&entries, &key).is_none() {
                entries.push((key, value));
            }
        }
    }
    let keys = ["aws_access_key_id", "aws_secret_access_key"].map(|k| option(&entries, k).is_some());
    if keys == [true, true] {
        tracing::info!(profile, "using S3 credentials of a profile");
        for (from, to) in [
            ("aws_access_key_id", "aws_access_key_id"),
            ("aws_secret_access_key", "aws_secret_access_key"),
            ("aws_session_token", "aws_session_token"),
            ("region", "aws_region"),
            ("endpoint_url", "aws_endpoint_url"),
        ] {
            if let Some(value) = option(&entries, from).filter(|_| option(options, to).is_none()) {
                options.push((to.to_owned(), value.to_owned()));
            }
        }
        return Ok(());
    }
    if let Some(key) = UNSUPPORTED_KEYS.iter().find(|k| option(&entries, k).is_some()) {
        return Err(format!("profile `{profile}` obtains its credentials by {key}, which is not supported: {ADVICE}"));
    }
    if requested.is_some() {
        let paths: Vec<String> = files.iter().flatten().map(|f| f.display().to_string()).collect();
        return Err(format!("there are no keys of profile `{profile}` in {}: {ADVICE}", paths.join(" or ")));
    }
    if option(options, "aws_metadata_endpoint").is_none() && !is_reachable(METADATA_ADDRESS).await {
        return Err(format!("there are no credentials for S3, and no instance metadata service responds: {ADVICE}"));
    }
    Ok(())
}

async fn is_reachable(address: &str) -> bool {
    matches!(tokio::time::timeout(METADATA_TIMEOUT, tokio::net::TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// Reads the keys of a profile from one file; empty without the file or the profile.
fn read_profile(file: &Path, profile: &str) -> Result<Options, String> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Options::new()),
        Err(e) => return Err(format!("{}: {e}", file.display())),
    };
    let options =
        ParseOption { enabled_escape: false, enabled_indented_mutiline_value: true, ..ParseOption::default() };
    // The error has the position only, since the line may contain a key.
    let parse_error =
        |e: ini::ParseError| format!("{}: cannot parse line {}, column {}", file.display(), e.line, e.col);
    let ini = Ini::load_from_str_opt(&text, options).map_err(parse_error)?;
    let names = [profile.to_owned(), format!("profile {profile}")];
    let sections = names.iter().filter_map(|name| ini.section(Some(name.as_str())));
    Ok(sections.flat_map(|s| s.iter()).map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, more: &[(&str, &str)]) -> Options {
        let mut out = vec![("home".to_owned(), dir.display().to_string())];
        out.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        out
    }

    #[tokio::test]
    async fn profiles_are_read_like_the_aws_command_line() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".aws")).unwrap();
        let credentials = "[default]\naws_access_key_id = AKD\naws_secret_access_key = a/b+c=\\n;d\n\n# mine\n\
                           [lab]\naws_access_key_id=AKL\naws_secret_access_key=s\naws_session_token=t\n[half]\naws_access_key_id=x\n";
        std::fs::write(dir.path().join(".aws/credentials"), credentials).unwrap();
        let config = "[default]\nregion = eu-west-1\n[profile lab]\nregion = eu-central-1\nendpoint_url = https://s3.lab\n\
                      s3 =\n  max_concurrent_requests = 20\n[profile sso]\nsso_session = x\n";
        std::fs::write(dir.path().join(".aws/config"), config).unwrap();
        let completed = async |more: &[(&str, &str)]| {
            let mut o = options(dir.path(), more);
            add_credentials(&mut o).await.map(|()| o)
        };
        let lab = completed(&[("aws_profile", "lab"), ("aws_region", "here")]).await.unwrap();
        assert_eq!(option(&lab, "aws_access_key_id"), Some("AKL"));
        assert_eq!(option(&lab, "aws_session_token"), Some("t"));
        assert_eq!(option(&lab, "aws_endpoint_url"), Some("https://s3.lab"));
        assert_eq!(option(&lab, "aws_region"), Some("here"), "a variable overrides the file");
        let default = completed(&[]).await.unwrap();
        assert_eq!(option(&default, "aws_secret_access_key"), Some("a/b+c=\\n;d"));
        assert_eq!(option(&default, "aws_region"), Some("eu-west-1"));
        let unchanged = completed(&[("aws_access_key_id", "mine"), ("aws_profile", "none")]).await.unwrap();
        assert_eq!(option(&unchanged, "aws_secret_access_key"), None, "with keys in variables no file is read");
        for (profile, word) in [("none", "there are no keys"), ("half", "there are no keys"), ("sso", "sso_session")] {
            let e = completed(&[("aws_profile", profile)]).await.unwrap_err();
            assert!(e.contains(profile) && e.contains(word) && e.contains("export-credentials"), "{e}");
        }
        std::fs::write(dir.path().join(".aws/credentials"), "[default\naws_secret_access_key=hidden").unwrap();
        let e = completed(&[]).await.unwrap_err();
        assert!(e.contains("credentials: cannot parse line") && !e.contains("hidden"), "{e}");
    }

    #[tokio::test]
    async fn missing_credentials_fail_promptly() {
        let dir = tempfile::tempdir().unwrap();
        let begin = std::time::Instant::now();
        let mut none = options(dir.path(), &[]);
        // On an instance with a role the metadata service responds.
        if !is_reachable(METADATA_ADDRESS).await {
            let e = add_credentials(&mut none).await.unwrap_err();
            assert!(e.contains("AWS_ACCESS_KEY_ID") && e.contains("AWS_PROFILE") && e.contains("role"), "{e}");
        }
        assert!(begin.elapsed() < 3 * METADATA_TIMEOUT);
        let other_endpoint = [("aws_metadata_endpoint", "http://127.0.0.1:1")];
        add_credentials(&mut options(dir.path(), &other_endpoint)).await.unwrap();
    }
}
