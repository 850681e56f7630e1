//! JSON encoding of chat requests and decoding of replies.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{ChatError, ChatMessage, ChatPart, ChatReply, ChatRequest, ChatRole};

/// Encodes the body of a request.
pub(crate) fn body(model: &str, request: &ChatRequest) -> String {
    let mut body = json!({
        "model": model,
        "messages": request.messages.iter().map(message).collect::<Vec<_>>(),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
    });
    if let Some(seed) = request.seed {
        body["seed"] = seed.into();
    }
    if request.json {
        body["response_format"] = json!({"type": "json_object"});
    }
    body.to_string()
}

/// Encodes a message. A single text is encoded as a string, because not every endpoint accepts lists of parts.
fn message(m: &ChatMessage) -> Value {
    let role = match m.role {
        ChatRole::System => "system",
        ChatRole::User => "user",
        ChatRole::Assistant => "assistant",
    };
    let content = match m.parts.as_slice() {
        [ChatPart::Text(text)] => json!(text),
        parts => parts.iter().map(part).collect(),
    };
    json!({"role": role, "content": content})
}

fn part(p: &ChatPart) -> Value {
    match p {
        ChatPart::Text(text) => json!({"type": "text", "text": text}),
        ChatPart::ImageUrl(url) => json!({"type": "image_url", "image_url": {"url": url}}),
    }
}

/// Decodes a reply.
pub(crate) fn reply(body: &[u8]) -> Result<ChatReply, ChatError> {
    #[derive(Deserialize)]
    struct Completion {
        choices: Vec<Choice>,
        usage: Option<Usage>,
    }
    #[derive(Deserialize)]
    struct Choice {
        message: Content,
        finish_reason: Option<String>,
    }
    #[derive(Deserialize)]
    struct Content {
        content: Option<String>,
    }
    #[derive(Deserialize)]
    struct Usage {
        prompt_tokens: u64,
        #[serde(default)]
        completion_tokens: u64,
    }
    let completion: Completion = serde_json::from_slice(body).map_err(|e| ChatError::Malformed(e.to_string()))?;
    let choice = completion.choices.into_iter().next();
    let choice = choice.ok_or_else(|| ChatError::Malformed("it has no choice".to_owned()))?;
    let text = choice.message.content.ok_or_else(|| ChatError::Malformed("its message has no content".to_owned()))?;
    let usage = completion.usage.map(|u| [u.prompt_tokens, u.completion_tokens]);
    Ok(ChatReply { text, finish: choice.finish_reason.unwrap_or_default(), usage })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_bodies() {
        let mut r = ChatRequest {
            messages: vec![ChatMessage::text(ChatRole::System, "be short")],
            max_tokens: 9,
            temperature: 0.0,
            seed: None,
            json: false,
        };
        r.messages.push(ChatMessage {
            role: ChatRole::User,
            parts: vec![ChatPart::Text("what?".into()), ChatPart::ImageUrl("data:image/png;base64,AA".into())],
        });
        let v: Value = serde_json::from_str(&body("m", &r)).unwrap();
        assert_eq!(v["messages"][0], json!({"role": "system", "content": "be short"}));
        assert_eq!(v["messages"][1]["content"][1]["image_url"]["url"], "data:image/png;base64,AA");
        assert!(v.get("seed").is_none() && v.get("response_format").is_none());
        let v: Value = serde_json::from_str(&body("m", &ChatRequest { seed: Some(3), json: true, ..r })).unwrap();
        assert_eq!((&v["seed"], &v["response_format"]["type"]), (&json!(3), &json!("json_object")));
    }

    #[test]
    fn reply_bodies() {
        let r =
            reply(br#"{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3}}"#);
        assert_eq!(r, Ok(ChatReply { text: "x".into(), finish: "stop".into(), usage: Some([3, 0]) }));
        for bad in ["", "[]", "{", r#"{"choices":[]}"#, r#"{"choices":[{"message":{"content":null}}]}"#, "\u{0}"] {
            assert!(matches!(reply(bad.as_bytes()), Err(ChatError::Malformed(_))), "{bad}");
        }
    }
}
