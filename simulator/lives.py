"""One customer's life: a subscription is begun, renewed, changed, not paid, paused, ended and begun again.

Everything happens at whole seconds. A life is a list of appointments (a heap) worked through in order of time until the
horizon; each appointment looks at the state it finds, so plots that no longer fit simply do not happen.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from simulator import billing
from simulator.billing import Desk, attempt, change_customer, change_subscription, finalize, tell_subscription
from simulator.catalogue import PLANS, PRICES, price_id
from simulator.chance import base62
from simulator.people import other_email
from simulator.shapes import render_customer, render_payment_method
from simulator.state import Charge, Customer, Invoice, Line, Subscription, SubscriptionState

HOUR, DAY = 3_600, 86_400
TRIAL = 14 * DAY
RENEWAL_FAILS, REFUNDED, DISPUTED = 0.07, 0.1, 0.07
BEGINNINGS = ("trial",) * 7 + ("direct",) * 6 + ("incomplete",) * 4 + ("expired", "trial_paused", "trial_canceled")


def next_period(at: int, interval: str) -> int:
    """The same day and time a month (or a year) later; the last day of a shorter month."""
    moment = datetime.fromtimestamp(at, UTC)
    months = moment.month - 1 + (12 if interval == "year" else 1)
    year, month = moment.year + months // 12, months % 12 + 1
    for day in range(moment.day, 27, -1):
        try:
            return int(moment.replace(year=year, month=month, day=day).timestamp())
        except ValueError:
            continue
    return int(moment.replace(year=year, month=month).timestamp())


Plot = Callable[["Life", int, Subscription], None]


class Life:
    """One customer with all of its subscriptions. Call `live` once; the facts are in `subscriptions` and in the log."""

    def __init__(self, desk: Desk, customer: Customer, beginning: str, plots: Sequence[Plot]) -> None:
        """`beginning`: how the first subscription starts (BEGINNINGS); `plots`: what happens, in order, once it is active."""
        self.desk, self.customer, self.beginning, self.plots = desk, customer, beginning, plots
        self.rng = desk.rng
        self.horizon = desk.log.horizon
        self.subscriptions: list[Subscription] = []
        self.deleted_at: int | None = None
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._appointments = 0

    def live(self) -> None:
        """Work through the life, up to the horizon."""
        customer, rng = self.customer, self.rng
        self.desk.log.add(customer.created, "customer.created", render_customer(customer), asked=True)
        hesitates = rng.random() < 0.3
        wait = rng.randint(6 * HOUR, 5 * DAY) if hesitates else rng.randint(60, 1800)
        self.at(customer.created + wait, lambda at: self.subscribe(at, self.beginning))
        if rng.random() < 0.2:
            self.at(rng.randint(customer.created + DAY, max(customer.created + 2 * DAY, self.horizon)), self._moved_on)
        while self._agenda:
            at, _, action = heapq.heappop(self._agenda)
            if at >= self.horizon or self.deleted_at is not None:
                break
            action(at)

    # Appointments

    def at(self, when: int, action: Callable[[int], None]) -> None:
        """Appoint `action` at second `when`."""
        self._appointments += 1
        heapq.heappush(self._agenda, (when, self._appointments, action))

    def after(self, at: int, low: float, high: float, action: Callable[[int], None]) -> None:
        """An appointment `low` to `high` days after `at`."""
        self.at(at + self.rng.randint(int(low * DAY), int(high * DAY)), action)

    def _moved_on(self, at: int) -> None:
        if self.rng.random() < 0.7:
            change_customer(self.desk, self.customer, at, asked=True, email=other_email(self.rng, self.customer.person))
        else:
            name = f"{self.customer.state.name} {self.rng.choice(('GmbH', 'Ltd', 'Inc.', 'Group'))}"
            change_customer(self.desk, self.customer, at, asked=True, name=name)

    # Beginning

    def subscribe(self, at: int, beginning: str, plan: str | None = None) -> None:
        """A new subscription, begun in one of the ways of BEGINNINGS."""
        rng, customer = self.rng, self.customer
        plan = plan or rng.choices(PLANS, (60, 30, 10))[0]
        interval = "month" if rng.random() < 0.85 else "year"
        price = PRICES[price_id(plan, interval, customer.currency)]
        quantity = {"starter": rng.randint(1, 5), "pro": rng.randint(2, 15), "enterprise": rng.randint(5, 40)}[plan]
        trial = beginning.startswith("trial")
        end = at + TRIAL if trial else next_period(at, interval)
        status = "trialing" if trial else "incomplete" if beginning in ("incomplete", "expired") else "active"
        state = SubscriptionState(status, price, quantity, at, end)
        if trial:
            state = replace(state, trial_start=at, trial_end=end)
        has_card = beginning != "trial_paused"
        if has_card and customer.state.default_payment_method is None:
            self._attach_card(at)
        sub = Subscription(f"sub_1{base62(rng, 23)}", f"si_{base62(rng, 14)}", customer, at)
        invoice = billing.draft_invoice(self.desk, sub, at, "subscription_create", [], at)
        amount = 0 if trial else price.unit_minor * quantity
        invoice.lines.append(billing.period_line(self.desk, state, amount))
        sub.states.append((at, replace(state, latest_invoice=invoice.id)))
        self.subscriptions.append(sub)
        billing.tell_invoice(self.desk, invoice, at, "invoice.created")
        finalize(self.desk, invoice, at)
        if beginning == "direct":
            self.collect(invoice, at, succeeds=True)
        tell_subscription(self.desk, sub, at, "customer.subscription.created", asked=True)
        if trial:
            self.at(end - 3 * DAY, lambda t: self._trial_will_end(t, sub))
            self.at(end, lambda t: self._trial_end(t, sub, beginning))
        elif beginning == "direct":
            self._begin_periods(at, sub)
        elif beginning == "incomplete":
            wait = 0 if rng.random() < 0.4 else rng.randint(1, 900)
            self.at(at + wait, lambda t: self._first_payment(t, sub, invoice))
        else:
            self.collect(invoice, at, succeeds=False)
            self.at(at + 23 * HOUR, lambda t: self._expire(t, sub, invoice))

    def _attach_card(self, at: int) -> None:
        self.desk.log.add(at, "payment_method.attached", render_payment_method(self.customer), asked=True)
        change_customer(self.desk, self.customer, at, asked=True, default_payment_method=self.customer.card.id)

    def _first_payment(self, at: int, sub: Subscription, invoice: Invoice) -> None:
        self.collect(invoice, at, succeeds=True)
        change_subscription(self.desk, sub, at, asked=True, status="active", default_payment_method=self.customer.card.id)
        self._begin_periods(at, sub)

    def _expire(self, at: int, sub: Subscription, invoice: Invoice) -> None:
        change_subscription(self.desk, sub, at, status="incomplete_expired", ended_at=at)
        billing.give_up(self.desk, invoice, at, void=True)
        if self.rng.random() < 0.7:
            self.after(at, 0.5, 6, lambda t: self.subscribe(t, "direct", sub.now.price.plan))

    def _trial_will_end(self, at: int, sub: Subscription) -> None:
        if sub.now.status == "trialing":
            tell_subscription(self.desk, sub, at, "customer.subscription.trial_will_end")

    def _trial_end(self, at: int, sub: Subscription, beginning: str) -> None:
        if sub.now.status != "trialing":
            return
        if beginning == "trial_paused":
            change_subscription(self.desk, sub, at, status="paused")
            tell_subscription(self.desk, sub, at, "customer.subscription.paused")
            self.after(at, 1, 7, lambda t: self._resume(t, sub))
        elif beginning == "trial_canceled":
            change_subscription(
                self.desk,
                sub,
                at,
                status="canceled",
                canceled_at=at,
                ended_at=at,
                cancellation_reason="cancellation_requested",
            )
        else:
            self._renew(at, sub)
            self._begin_periods(at, sub)

    def _resume(self, at: int, sub: Subscription) -> None:
        self._attach_card(at)
        end = next_period(at, sub.now.price.interval)
        ready = replace(sub.now, period_start=at, period_end=end)
        line = billing.period_line(self.desk, ready, ready.price.unit_minor * ready.quantity)
        invoice = self.invoice_now(at, sub, "subscription_cycle", [line], succeeds=True)
        change_subscription(
            self.desk, sub, at, asked=True, status="active", period_start=at, period_end=end, latest_invoice=invoice.id
        )
        tell_subscription(self.desk, sub, at, "customer.subscription.resumed", asked=True)
        self._begin_periods(at, sub)

    # Periods and payments

    def _begin_periods(self, at: int, sub: Subscription) -> None:
        """The subscription became active for the first time: appoint the next renewal, and the plots."""
        self.appoint_renewal(sub)
        plots, self.plots = self.plots, ()
        left = self.horizon - at
        for number, plot in enumerate(plots):
            low, high = number / len(plots), (number + 0.7) / len(plots)
            when = at + 2 * HOUR + int(self.rng.uniform(low, high) * 0.8 * left)
            self.at(when, lambda t, plot=plot: self.play(t, sub, plot))  # type: ignore[misc]

    def play(self, at: int, sub: Subscription, plot: Plot) -> None:
        """Let a plot happen, if the subscription is in a state for it."""
        state = sub.now
        if state.status == "active" and state.pause_behavior is None and state.period_end > at:
            plot(self, at, sub)

    def appoint_renewal(self, sub: Subscription) -> None:
        """Renew at the end of the present period, unless another period has begun by then."""
        end = sub.now.period_end
        self.at(end, lambda t: self._renew(t, sub) if sub.now.period_end == end else None)

    def _renew(self, at: int, sub: Subscription) -> None:
        """The period is over: cancel if that was asked for, else a new period and its invoice (payable an hour later)."""
        state = sub.now
        if state.status not in ("active", "trialing", "past_due", "unpaid"):
            return
        if state.cancel_at_period_end:
            change_subscription(self.desk, sub, at, status="canceled", ended_at=at)
            return
        end = next_period(at, state.price.interval)
        new = replace(state, period_start=at, period_end=end)
        line = billing.period_line(self.desk, new, new.price.unit_minor * new.quantity)
        invoice = billing.draft_invoice(self.desk, sub, at, "subscription_cycle", [line], state.period_start)
        billing.tell_invoice(self.desk, invoice, at, "invoice.created")
        status = "active" if state.status == "trialing" else state.status
        change_subscription(self.desk, sub, at, status=status, period_start=at, period_end=end, latest_invoice=invoice.id)
        if state.status != "trialing":
            self.appoint_renewal(sub)
        if state.pause_behavior == "keep_as_draft" or state.status == "unpaid":
            return  # stays a draft
        self.at(at + HOUR, lambda t: self._collect_renewal(t, sub, invoice))

    def _collect_renewal(self, at: int, sub: Subscription, invoice: Invoice) -> None:
        finalize(self.desk, invoice, at)
        if sub.now.pause_behavior is not None:
            billing.give_up(self.desk, invoice, at, void=sub.now.pause_behavior == "void")
        elif not sub.now.alive:
            billing.give_up(self.desk, invoice, at, void=True)
        elif self.rng.random() >= RENEWAL_FAILS:
            self.collect(invoice, at + self.rng.randint(0, 2), succeeds=True)
        elif sub.now.status == "active":
            self.fall_due(at, sub, invoice, "recovered")

    def invoice_now(self, at: int, sub: Subscription, reason: str, lines: list[Line], *, succeeds: bool) -> Invoice:
        """An invoice that is made, finalized and tried in one second."""
        invoice = billing.draft_invoice(self.desk, sub, at, reason, lines, sub.now.period_start)
        billing.tell_invoice(self.desk, invoice, at, "invoice.created")
        finalize(self.desk, invoice, at)
        self.collect(invoice, at, succeeds=succeeds)
        return invoice

    def collect(self, invoice: Invoice, at: int, *, succeeds: bool, next_attempt: int | None = None) -> None:
        """Try to take the money; what was taken may be refunded or disputed later."""
        if invoice.intent is None:  # over nothing: already paid
            return
        charge = attempt(self.desk, invoice, at, succeeds=succeeds, next_attempt=next_attempt)
        if succeeds:
            chance = self.rng.random()
            if chance < REFUNDED:
                self.after(at, 0.2, 30, lambda t: self._refund(t, charge))
            elif chance < REFUNDED + DISPUTED:
                self.after(at, 3, 20, lambda t: self._dispute(t, charge))

    def _refund(self, at: int, charge: Charge) -> None:
        whole = charge.intent.amount - charge.refunded
        full = self.rng.random() < 0.5
        amount = whole if full else max(1, whole * self.rng.randint(10, 60) // 100)
        made = billing.refund(self.desk, charge, at, amount, self.rng.choice((None, "requested_by_customer", "duplicate")))
        if self.rng.random() < 0.1:
            self.after(at, 1, 4, lambda t: billing.fail_refund(self.desk, made, t))
        elif not full and self.rng.random() < 0.4:  # a second partial refund, by chance of the same amount
            again = min(amount, whole - amount)
            self.after(at, 0.001, 5, lambda t: self._refund_again(t, charge, again))

    def _refund_again(self, at: int, charge: Charge, amount: int) -> None:
        billing.refund(self.desk, charge, at, amount, None)

    def _dispute(self, at: int, charge: Charge) -> None:
        made = billing.open_dispute(self.desk, charge, at, inquiry=self.rng.random() < 0.2)
        self.after(at, 1, 5, lambda t: billing.answer_dispute(self.desk, made, t))
        won = self.rng.random() < 0.5
        self.after(at, 6, 15, lambda t: billing.close_dispute(self.desk, made, t, won=won))

    # Not paying

    def fall_due(self, at: int, sub: Subscription, invoice: Invoice, ending: str) -> None:
        """A payment fails: past_due, then `recovered`, `unpaid` or `canceled`."""
        retry = at + self.rng.randint(DAY, 3 * DAY)
        self.collect(invoice, at, succeeds=False, next_attempt=retry)
        change_subscription(self.desk, sub, at, status="past_due")
        change_customer(self.desk, self.customer, at, delinquent=True)
        if ending == "recovered":
            self.at(retry, lambda t: self._recover(t, sub, invoice))
        else:
            self.at(retry, lambda t: self._retry_in_vain(t, sub, invoice, ending))

    def _recover(self, at: int, sub: Subscription, invoice: Invoice) -> None:
        if sub.now.alive and invoice.status == "open":
            self.collect(invoice, at, succeeds=True)
            change_subscription(self.desk, sub, at, status="active")
            change_customer(self.desk, self.customer, at, delinquent=False)

    def _retry_in_vain(self, at: int, sub: Subscription, invoice: Invoice, ending: str) -> None:
        if not sub.now.alive:
            return
        self.collect(invoice, at, succeeds=False)
        if ending == "unpaid":
            change_subscription(self.desk, sub, at, status="unpaid")
            if self.rng.random() < 0.6:
                self.after(at, 1, 5, lambda t: self._recover(t, sub, invoice))
        else:
            self.cancel(at, sub, "payment_failed")
            billing.give_up(self.desk, invoice, at, void=self.rng.random() < 0.4)

    def cancel(self, at: int, sub: Subscription, reason: str) -> None:
        """Cancel at once, if it is still alive."""
        if sub.now.alive:
            asked = reason == "cancellation_requested"
            change_subscription(
                self.desk,
                sub,
                at,
                asked=asked,
                status="canceled",
                canceled_at=at,
                ended_at=at,
                cancellation_reason=reason,
            )
