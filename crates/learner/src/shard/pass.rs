//! One pass through a model whose state is divided: brings parameters and takes gradients around the layers, in an order that is
//! the same on all ranks whatever they compute, or whether they compute anything.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use unveil_model::{Escort, Way};

use super::gathered::Gathered;
use super::gradients::Gradients;
use crate::error::{LearnerError, Result};

/// What goes along with passes of one model.
#[derive(Clone, Default)]
pub(crate) struct Course {
    /// Where parameters are divided.
    pub gathered: Option<Rc<Gathered>>,
    /// Where gradients are taken.
    pub gradients: Option<Rc<RefCell<Gradients>>>,
    /// Whether layers are escorted; else gradients are taken at the end.
    pub by_layer: bool,
}

/// One pass there and, where it is asked for, back.
pub(crate) struct Pass {
    course: Course,
    /// Layers that are behind it on the way there, and that are before it on the way back.
    there: Cell<usize>,
    back: Cell<usize>,
    /// No other pass of the mini-batch follows.
    last: Cell<bool>,
    fault: RefCell<Option<LearnerError>>,
}

impl Course {
    fn layers(&self) -> usize {
        let taken = self.gradients.as_ref().map_or(0, |g| g.borrow().layers());
        self.gathered.as_ref().map_or(0, |g| g.layers).max(taken)
    }

    /// Begins a pass. All ranks begin theirs together.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn begin(&self) -> Result<Rc<Pass>> {
        if let Some(g) = &self.gathered {
            g.start(Some(0))?;
            g.bring(None)?;
        }
        let back = Cell::new(self.layers());
        let (there, last) = (Cell::new(0), Cell::new(false));
        Ok(Rc::new(Pass { course: self.clone(), there, back, last, fault: RefCell::new(None) }))
    }
}

impl Pass {
    /// What the tape is to be escorted by.
    pub fn escort(self: &Rc<Self>) -> Option<Rc<dyn Escort>> {
        self.course.by_layer.then(|| self.clone() as Rc<dyn Escort>)
    }

    /// The way there is done, or this rank has nothing to compute on it.
    ///
    /// # Errors
    /// What went wrong on the way.
    pub fn arrive(&self) -> Result<()> {
        self.catch_up(Way::Forward, self.course.layers());
        self.fault.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// The way back begins; `last` says that no other pass of the mini-batch follows.
    pub fn turn(&self, last: bool) {
        self.last.set(last);
    }

    /// The way back is done, or this rank has nothing to compute on it.
    ///
    /// # Errors
    /// What went wrong on the way.
    pub fn finish(&self) -> Result<()> {
        self.catch_up(Way::Backward, 0);
        self.keep(self.take(None));
        self.fault.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Makes the calls of layers that the pass did not visit up to `to`.
    fn catch_up(&self, way: Way, to: usize) {
        let next = || match way {
            Way::Forward => (self.there.get() < to).then(|| self.there.get()),
            Way::Backward => (self.back.get() > to).then(|| self.back.get() - 1),
        };
        while let Some(layer) = next() {
            self.keep(self.come(layer, way));
            self.keep(self.go(layer, way));
        }
    }

    fn come(&self, layer: usize, way: Way) -> Result<()> {
        let Some(g) = &self.course.gathered else { return Ok(()) };
        g.start(Some(layer))?;
        let next = match way {
            Way::Forward => Some(layer + 1).filter(|l| *l < g.layers),
            Way::Backward => layer.checked_sub(1),
        };
        if let Some(next) = next {
            g.start(Some(next))?;
        }
        g.bring(Some(layer))
    }

    fn go(&self, layer: usize, way: Way) -> Result<()> {
        match way {
            Way::Forward => self.there.set(layer + 1),
            Way::Backward => self.back.set(layer),
        }
        if let Some(g) = &self.course.gathered {
            g.part(Some(layer))?;
        }
        if way == Way::Backward { self.take(Some(layer)) } else { Ok(()) }
    }

    fn take(&self, layer: Option<usize>) -> Result<()> {
        let Some(gradients) = &self.course.gradients else { return Ok(()) };
        gradients.borrow_mut().take(layer, self.last.get())
    }

    /// Keeps the first fault; the pass goes on, since nothing in the middle of it can end it.
    fn keep(&self, result: Result<()>) {
        if let Err(e) = result {
            self.fault.borrow_mut().get_or_insert(e);
        }
    }
}

impl Escort for Pass {
    fn enter(&self, layer: usize, way: Way) {
        let before = if way == Way::Forward { layer } else { layer + 1 };
        self.catch_up(way, before);
        self.keep(self.come(layer, way));
    }

    fn leave(&self, layer: usize, way: Way) {
        self.keep(self.go(layer, way));
    }
}
