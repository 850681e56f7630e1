//! Keys shared by the sections with a chat endpoint: `[reward.judge]` and `[collect]`.

/// OpenAI-compatible endpoint of a section; `chat_section` documents the keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChatEndpoint<'a> {
    pub section: &'static str,
    pub base_url: &'a str,
    pub model: &'a str,
    pub max_tokens: u32,
    pub temperature: f64,
    pub deadline_s: f64,
    pub attempt_s: f64,
    pub tries: u32,
    pub concurrency: usize,
    pub per_minute: f64,
}

/// Declares the section `$section` with a chat endpoint. `connection` and `requests` are replaced by keys that all such sections have; a
/// section documents three of the latter itself, because their meanings differ.
macro_rules! chat_section {
    (
        $section:literal,
        $(#[$doc:meta])*
        pub struct $name:ident {
            connection,
            $($(#[$before:meta])* pub $before_key:ident: $before_type:ty,)*
            requests:
            $(#[$max_tokens:meta])* max_tokens,
            $(#[$temperature:meta])* temperature,
            $(#[$deadline_s:meta])* deadline_s,
            $($(#[$after:meta])* pub $after_key:ident: $after_type:ty,)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            /// URL of the endpoint without `/chat/completions`, for example `https://host/v1`.
            pub base_url: String,
            /// Environment variable that holds the API key. Empty: no key is sent.
            pub key_env: String,
            /// PEM file of certificate authorities to trust in addition to the system's. Empty: the system's only.
            pub ca: String,
            /// Model name sent to the endpoint.
            pub model: String,
            $($(#[$before])* pub $before_key: $before_type,)*
            $(#[$max_tokens])*
            #[schemars(range(min = 1))]
            pub max_tokens: u32,
            $(#[$temperature])*
            #[schemars(range(min = 0.0, max = 2.0))]
            pub temperature: f64,
            $(#[$deadline_s])*
            #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
            pub deadline_s: f64,
            /// Timeout of one request in seconds; afterwards it is retried.
            #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
            pub attempt_s: f64,
            /// Maximum number of requests per answer, at least 1.
            #[schemars(range(min = 1))]
            pub tries: u32,
            /// Maximum number of concurrent requests, at least 1.
            #[schemars(range(min = 1))]
            pub concurrency: usize,
            /// Maximum number of requests per minute; 0 sets no limit.
            #[schemars(range(min = 0.0))]
            pub per_minute: f64,
            $($(#[$after])* pub $after_key: $after_type,)*
        }

        impl $name {
            pub(crate) fn endpoint(&self) -> $crate::schema::ChatEndpoint<'_> {
                $crate::schema::ChatEndpoint {
                    section: $section,
                    base_url: &self.base_url,
                    model: &self.model,
                    max_tokens: self.max_tokens,
                    temperature: self.temperature,
                    deadline_s: self.deadline_s,
                    attempt_s: self.attempt_s,
                    tries: self.tries,
                    concurrency: self.concurrency,
                    per_minute: self.per_minute,
                }
            }
        }
    };
}

pub(super) use chat_section;
