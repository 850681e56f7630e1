//! All ranks take up one checkpoint: rank 0 names the newest, each reads what it needs and checks it meanwhile, and where one finds
//! damage all go to the one before.

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use unveil_checkpoint::{CheckpointInfo, Choice, Error, Reader, Store};

use crate::crew::Crew;
use crate::error::{LearnerError, Result};
use crate::state::Meta;

/// How a rank fared with a checkpoint.
#[derive(Serialize, Deserialize)]
enum Fared {
    Well,
    Damaged { place: String, object: String, why: String },
    Badly(String),
}

/// Takes up the newest checkpoint that all ranks find whole; none: there is none. `choice` is rank 0's. `attempt` reads this rank's share.
/// All ranks call it.
///
/// # Errors
/// No checkpoint can be used, one does not fit, a store cannot be reached; or a rank is gone.
pub(crate) fn take_up(
    crew: &Crew,
    (handle, store): (&Handle, &Store),
    mut choice: Option<&mut Choice>,
    mut attempt: impl FnMut(&Reader) -> Result<Meta>,
) -> Result<Option<(CheckpointInfo, Meta)>> {
    let fault = |e: serde_json::Error| LearnerError::Setting(format!("what to go on from: {e}"));
    loop {
        let text = match &mut choice {
            Some(choice) => Some(serde_json::to_vec(&choice.take()?).map_err(fault)?),
            None => None,
        };
        let told = crew.send(text.as_deref())?;
        let Some(info): Option<CheckpointInfo> = serde_json::from_slice(&told).map_err(fault)? else { return Ok(None) };
        let own = handle.block_on(Reader::open(store, &info)).map_err(LearnerError::from).and_then(|reader| {
            let meta = attempt(&reader)?;
            if choice.is_some() {
                handle.block_on(reader.check_files())?;
            }
            Ok(meta)
        });
        let fared = match &own {
            Ok(_) => Fared::Well,
            Err(LearnerError::Checkpoint(Error::Corrupt { place, object, why })) => {
                Fared::Damaged { place: place.clone(), object: object.clone(), why: why.clone() }
            }
            Err(e) => Fared::Badly(e.to_string()),
        };
        let text = serde_json::to_vec(&fared).map_err(fault)?;
        let all = crew.collect(Some(&text))?.unwrap_or_default();
        let mut damage = None;
        for (rank, text) in all.iter().enumerate() {
            match serde_json::from_slice(text).map_err(fault)? {
                Fared::Well => {}
                Fared::Damaged { place, object, why } => {
                    damage = damage.or(Some(Error::Corrupt { place, object, why }))
                }
                Fared::Badly(_) if rank == crew.ranks.rank() => return own.map(|meta| Some((info, meta))),
                Fared::Badly(why) => {
                    return Err(LearnerError::Setting(format!("rank {rank} cannot go on from a checkpoint: {why}")));
                }
            }
        }
        match (damage, own) {
            (None, own) => return own.map(|meta| Some((info, meta))),
            (Some(damage), _) => {
                if let Some(choice) = &mut choice {
                    choice.pass(&info, damage)?;
                }
            }
        }
    }
}
