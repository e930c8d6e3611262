//! The kernel's frontends: unbind, bind, unload.

use std::fs;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use super::read;
use crate::sys::modules;

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "module-unload" => {
            read(arguments).and_then(|name: String| modules::unload(&name)).map(|()| Value::Null)
        }
        "driver-bind" => read(arguments).and_then(|it: Bound| it.write("bind")),
        "driver-unbind" => read(arguments).and_then(|it: Bound| it.write("unbind")),
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Bound {
    /// `vbd` or `vif`
    driver: String,
    /// `vbd-51712`
    device: String,
}

impl Bound {
    fn write(&self, file: &str) -> Result<Value> {
        let path = format!("/sys/bus/xen/drivers/{}/{file}", self.driver);
        fs::write(&path, &self.device).with_context(|| format!("{path}: {}", self.device))?;
        Ok(Value::Null)
    }
}
