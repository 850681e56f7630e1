//! Credentials for S3 that stand in AWS's own files, and an answer at once where there are none at all. Must not know: the store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ini::{Ini, ParseOption};

/// What the instance's metadata service may take to be reached; it is one hop away.
const METADATA: Duration = Duration::from_secs(2);
const METADATA_ADDRESS: &str = "169.254.169.254:80";
/// What to do where credentials are missing.
const ADVICE: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (`eval $(aws configure export-credentials --format env)` does so \
                      from any profile), name a profile with keys by AWS_PROFILE, or run where the instance has a role";
/// Keys of a profile that need a program or a service to become credentials.
const NEED_MORE: [&str; 4] = ["sso_session", "sso_start_url", "credential_process", "role_arn"];

/// Options as lower-case names and values.
type Options = Vec<(String, String)>;

fn option<'a>(options: &'a Options, name: &str) -> Option<&'a str> {
    options.iter().find(|(k, v)| k == name && !v.is_empty()).map(|(_, v)| v.as_str())
}

/// Whether the options themselves say who calls, or that nobody needs to.
fn known(options: &Options) -> bool {
    let has = |name: &str| option(options, name).is_some();
    has("aws_access_key_id")
        || has("aws_secret_access_key")
        || (has("aws_web_identity_token_file") && has("aws_role_arn"))
        || has("aws_container_credentials_relative_uri")
        || (has("aws_container_credentials_full_uri") && has("aws_container_authorization_token_file"))
        || option(options, "aws_skip_signature").is_some_and(|v| matches!(v, "true" | "1" | "yes" | "on" | "y"))
}

/// Adds the credentials, region and endpoint of the profile `AWS_PROFILE` (`default` without it) where the options hold none, as the
/// AWS command line reads them from `AWS_SHARED_CREDENTIALS_FILE` (`~/.aws/credentials`) and `AWS_CONFIG_FILE` (`~/.aws/config`).
///
/// # Errors
/// What is missing or cannot be used, and what to do.
pub(crate) async fn complete(options: &mut Options) -> Result<(), String> {
    if known(options) {
        return Ok(());
    }
    let home = option(options, "home").map(PathBuf::from);
    let place = |variable: &str, file: &str| {
        option(options, variable).map(PathBuf::from).or_else(|| Some(home.as_ref()?.join(".aws").join(file)))
    };
    let named = option(options, "aws_profile").or_else(|| option(options, "aws_default_profile")).map(str::to_owned);
    let profile = named.clone().unwrap_or_else(|| "default".to_owned());
    let files = [place("aws_shared_credentials_file", "credentials"), place("aws_config_file", "config")];
    let mut found = Options::new();
    for file in files.iter().flatten() {
        for (key, value) in section(file, &profile)? {
            if option(&found, &key).is_none() {
                found.push((key, value));
            }
        }
    }
    let keys = ["aws_access_key_id", "aws_secret_access_key"].map(|k| option(&found, k).is_some());
    if keys == [true, true] {
        tracing::info!(profile, "credentials for S3 come from a profile");
        for (from, to) in [
            ("aws_access_key_id", "aws_access_key_id"),
            ("aws_secret_access_key", "aws_secret_access_key"),
            ("aws_session_token", "aws_session_token"),
            ("region", "aws_region"),
            ("endpoint_url", "aws_endpoint_url"),
        ] {
            if let Some(value) = option(&found, from).filter(|_| option(options, to).is_none()) {
                options.push((to.to_owned(), value.to_owned()));
            }
        }
        return Ok(());
    }
    if let Some(key) = NEED_MORE.iter().find(|k| option(&found, k).is_some()) {
        return Err(format!("profile `{profile}` gets its credentials by {key}, which is not done here: {ADVICE}"));
    }
    if named.is_some() {
        let places: Vec<String> = files.iter().flatten().map(|f| f.display().to_string()).collect();
        return Err(format!("there are no keys of profile `{profile}` in {}: {ADVICE}", places.join(" or ")));
    }
    if option(options, "aws_metadata_endpoint").is_none() && !reached(METADATA_ADDRESS).await {
        return Err(format!("there are no credentials for S3, and no instance role answers: {ADVICE}"));
    }
    Ok(())
}

async fn reached(address: &str) -> bool {
    matches!(tokio::time::timeout(METADATA, tokio::net::TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// The keys of a profile in one file; nothing where there is no such file or profile.
fn section(file: &Path, profile: &str) -> Result<Options, String> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Options::new()),
        Err(e) => return Err(format!("{}: {e}", file.display())),
    };
    let form = ParseOption { enabled_escape: false, enabled_indented_mutiline_value: true, ..ParseOption::default() };
    // What is wrong is told by its place alone: the line may hold a key.
    let bad = |e: ini::ParseError| format!("{}: line {}, column {} is not read", file.display(), e.line, e.col);
    let all = Ini::load_from_str_opt(&text, form).map_err(bad)?;
    let names = [profile.to_owned(), format!("profile {profile}")];
    let found = names.iter().filter_map(|name| all.section(Some(name.as_str())));
    Ok(found.flat_map(|s| s.iter()).map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned())).collect())
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
    async fn profiles_are_read_as_the_command_line_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".aws")).unwrap();
        let credentials = "[default]\naws_access_key_id = AKD\naws_secret_access_key = a/b+c=\\n;d\n\n# mine\n\
                           [lab]\naws_access_key_id=AKL\naws_secret_access_key=s\naws_session_token=t\n[half]\naws_access_key_id=x\n";
        std::fs::write(dir.path().join(".aws/credentials"), credentials).unwrap();
        let config = "[default]\nregion = eu-west-1\n[profile lab]\nregion = eu-central-1\nendpoint_url = https://s3.lab\n\
                      s3 =\n  max_concurrent_requests = 20\n[profile sso]\nsso_session = x\n";
        std::fs::write(dir.path().join(".aws/config"), config).unwrap();
        let got = async |more: &[(&str, &str)]| {
            let mut o = options(dir.path(), more);
            complete(&mut o).await.map(|()| o)
        };
        let lab = got(&[("aws_profile", "lab"), ("aws_region", "here")]).await.unwrap();
        assert_eq!(option(&lab, "aws_access_key_id"), Some("AKL"));
        assert_eq!(option(&lab, "aws_session_token"), Some("t"));
        assert_eq!(option(&lab, "aws_endpoint_url"), Some("https://s3.lab"));
        assert_eq!(option(&lab, "aws_region"), Some("here"), "a variable goes before the file");
        let usual = got(&[]).await.unwrap();
        assert_eq!(option(&usual, "aws_secret_access_key"), Some("a/b+c=\\n;d"));
        assert_eq!(option(&usual, "aws_region"), Some("eu-west-1"));
        let own = got(&[("aws_access_key_id", "mine"), ("aws_profile", "none")]).await.unwrap();
        assert_eq!(option(&own, "aws_secret_access_key"), None, "variables with keys are all there is");
        for (profile, word) in [("none", "there are no keys"), ("half", "there are no keys"), ("sso", "sso_session")] {
            let e = got(&[("aws_profile", profile)]).await.unwrap_err();
            assert!(e.contains(profile) && e.contains(word) && e.contains("export-credentials"), "{e}");
        }
        std::fs::write(dir.path().join(".aws/credentials"), "[default\naws_secret_access_key=hidden").unwrap();
        let e = got(&[]).await.unwrap_err();
        assert!(e.contains("credentials: line") && !e.contains("hidden"), "{e}");
    }

    #[tokio::test]
    async fn who_has_no_credentials_learns_it_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let begun = std::time::Instant::now();
        let mut none = options(dir.path(), &[]);
        // Where the tests run on an instance with a role, it answers.
        if !reached(METADATA_ADDRESS).await {
            let e = complete(&mut none).await.unwrap_err();
            assert!(e.contains("AWS_ACCESS_KEY_ID") && e.contains("AWS_PROFILE") && e.contains("role"), "{e}");
        }
        assert!(begun.elapsed() < 3 * METADATA);
        let elsewhere = [("aws_metadata_endpoint", "http://127.0.0.1:1")];
        complete(&mut options(dir.path(), &elsewhere)).await.unwrap();
    }
}
